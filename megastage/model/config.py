"""Model hyper-parameters as plain frozen data: no torch, so that planning tools can import them anywhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are changed to extend the context.

    kind: "linear" (Chen et al. 2023), "llama3" (Llama 3.1 release) or "yarn" (Peng et al. 2023).
    factor: by how much the context grows; original_max_positions: the context length trained at before.
    low_freq_factor, high_freq_factor: llama3 only. beta_fast, beta_slow, attention_factor: yarn only
    (attention_factor None: 0.1 ln(factor) + 1).
    """

    kind: str
    factor: float
    original_max_positions: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding: base `theta` and optional scaling."""

    theta: float = 500_000.0
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. All sizes are in elements; `head_dim` need not be dim // n_heads."""

    name: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tied_embeddings: bool = False
    rope: RopeSpec = RopeSpec()
    init_std: float = 0.02
