"""Names and shapes of a model's parameters, without building it (pure Python): for init, conversion and planning."""

from __future__ import annotations

import math
from collections.abc import Iterable

from megastage.model.config import ModelConfig

Shape = tuple[int, ...]


def layer_shapes(cfg: ModelConfig) -> dict[str, Shape]:
    """Parameters of one layer by their name inside the layer, in the decoder's order; matrices are [out, in]."""
    q_dim, kv_dim = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    qk_norms: dict[str, Shape] = {"attention.q_norm": (cfg.head_dim,), "attention.k_norm": (cfg.head_dim,)}
    shapes: dict[str, Shape] = {
        "attention_norm": (cfg.dim,),
        "attention.wq": (q_dim, cfg.dim),
        "attention.wk": (kv_dim, cfg.dim),
        "attention.wv": (kv_dim, cfg.dim),
        "attention.wo": (cfg.dim, q_dim),
        **(qk_norms if cfg.qk_norm else {}),
        "ffn_norm": (cfg.dim,),
        "feed_forward.w1": (cfg.ffn_dim, cfg.dim),
        "feed_forward.w3": (cfg.ffn_dim, cfg.dim),
        "feed_forward.w2": (cfg.dim, cfg.ffn_dim),
    }
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def parameter_shapes(
    cfg: ModelConfig, layers: Iterable[int] | None = None, has_embedding: bool = True, has_head: bool = True
) -> dict[str, Shape]:
    """Global shape of every parameter of a `Decoder` built with the same arguments, in its order."""
    shapes: dict[str, Shape] = {}
    if has_embedding or (has_head and cfg.tied_embeddings):
        shapes["tok_embeddings.weight"] = (cfg.vocab_size, cfg.dim)
    for i in range(cfg.n_layers) if layers is None else layers:
        shapes.update({f"layers.{i}.{name}": shape for name, shape in layer_shapes(cfg).items()})
    if has_head:
        shapes["norm.weight"] = (cfg.dim,)
        if not cfg.tied_embeddings:
            shapes["output.weight"] = (cfg.vocab_size, cfg.dim)
    return shapes


def count_parameters(cfg: ModelConfig) -> int:
    """Number of parameters; a tied weight counts once."""
    per_layer = sum(map(math.prod, layer_shapes(cfg).values()))
    return cfg.n_layers * per_layer + sum(map(math.prod, parameter_shapes(cfg, layers=()).values()))
