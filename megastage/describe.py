"""Lines and facts about a run that both its log and the planning tool show."""

from __future__ import annotations

from megastage.config.layout import Layout
from megastage.config.schema import Config
from megastage.model.config import ModelConfig


def layout_line(layout: Layout) -> str:
    """How many ranks go where."""
    return (
        f"{layout.world_size} ranks = pipeline {layout.pp} x replicate {layout.dp_replicate} x shard {layout.dp_shard} "
        f"x context {layout.cp} x tensor {layout.tp}"
    )


def model_line(model: ModelConfig, parameters: int) -> str:
    """The model's size and shape."""
    return (
        f"Model {model.name}: {parameters:,} parameters (dim {model.dim}, {model.n_layers} layers, "
        f"{model.n_heads} heads, {model.n_kv_heads} key/value heads, head dim {model.head_dim}, "
        f"vocabulary {model.vocab_size}"
        f"{', tied' if model.tied_embeddings else ''})"
    )


def reshards(cfg: Config, layout: Layout) -> bool:
    """Whether FSDP frees a layer's gathered parameters between forward and backward."""
    choice = cfg.parallelism.fsdp_reshard_after_forward
    return layout.pp == 1 if choice == "default" else choice == "always"
