"""Named model sizes with the hyper-parameters of their public releases (pure Python).

llama3: Llama 3 8B and 70B, Llama 3.1 405B, Llama 3.2 1B and 3B (Grattafiori et al. 2024 and the releases' configs).
qwen3: the dense models of Yang et al. 2025. `debugmodel` is a toy of the same architecture.
"""

from __future__ import annotations

from dataclasses import replace

from megastage.model.config import ModelConfig, RopeScaling, RopeSpec


def _llama3(
    dim: int, n_layers: int, n_heads: int, ffn_dim: int, *, head_dim: int = 128, tied: bool = False,
    rope_factor: float | None = None,
) -> ModelConfig:  # fmt: skip
    scaling = None if rope_factor is None else RopeScaling("llama3", rope_factor)
    return ModelConfig(
        name="llama3",
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=8,
        head_dim=head_dim,
        ffn_dim=ffn_dim,
        vocab_size=128_256,
        norm_eps=1e-5,
        tied_embeddings=tied,
        rope=RopeSpec(500_000.0, scaling),
    )


def _qwen3(dim: int, n_layers: int, n_heads: int, ffn_dim: int, *, tied: bool = False) -> ModelConfig:
    return ModelConfig(
        name="qwen3",
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=8,
        head_dim=128,
        ffn_dim=ffn_dim,
        vocab_size=151_936,
        norm_eps=1e-6,
        qk_norm=True,
        tied_embeddings=tied,
        rope=RopeSpec(1_000_000.0),
    )


_DEBUG = ModelConfig("llama3", 256, 6, 8, 4, 32, 768, 2048)

FLAVORS: dict[str, dict[str, ModelConfig]] = {
    "llama3": {
        "debugmodel": _DEBUG,
        "1B": _llama3(2048, 16, 32, 8192, head_dim=64, tied=True, rope_factor=32.0),
        "3B": _llama3(3072, 28, 24, 8192, tied=True, rope_factor=32.0),
        "8B": _llama3(4096, 32, 32, 14_336),
        "70B": _llama3(8192, 80, 64, 28_672),
        "405B": _llama3(16_384, 126, 128, 53_248, rope_factor=8.0),
    },
    "qwen3": {
        "debugmodel": replace(
            _DEBUG, name="qwen3", norm_eps=1e-6, qk_norm=True, tied_embeddings=True, rope=RopeSpec(1_000_000.0)
        ),
        "0.6B": _qwen3(1024, 28, 16, 3072, tied=True),
        "1.7B": _qwen3(2048, 28, 16, 6144, tied=True),
        "4B": _qwen3(2560, 36, 32, 9728, tied=True),
        "8B": _qwen3(4096, 36, 32, 12_288),
        "14B": _qwen3(5120, 40, 40, 17_408),
        "32B": _qwen3(5120, 64, 64, 25_600),
    },
}


def get_flavor(name: str, flavor: str, *, vocab_size: int | None = None) -> ModelConfig:
    """Hyper-parameters of [model] name and flavor; `vocab_size` replaces the released one (another tokenizer).

    Raises ValueError that lists what exists.
    """
    if name not in FLAVORS:
        raise ValueError(f'model.name = "{name}" is not known: use one of {", ".join(FLAVORS)}')
    if flavor not in FLAVORS[name]:
        raise ValueError(f'model.flavor = "{flavor}" is not known for {name}: use one of {", ".join(FLAVORS[name])}')
    cfg = FLAVORS[name][flavor]
    return cfg if vocab_size is None else replace(cfg, vocab_size=vocab_size)
