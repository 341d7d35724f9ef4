"""Activation recomputation: which layers run their forward pass again during backward, and how.

Modes and options are those of [activation_checkpoint]: "none"; "full" (every layer); "selective" with a number k (every
k-th layer, counted from 1 over the whole model) or "op" (in every layer matrix products and attention are kept, and
only norms, RoPE and activations run again).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megastage.model.decoder import Decoder
from megastage.model.recompute_plan import recomputes

_KEPT = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product_")


def _keep_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is dear to compute; our own attention op is known by its name."""
    name = op.name()
    if name.startswith(_KEPT) or (name.startswith("megastage::") and "attention" in name):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def set_recompute(model: Decoder, mode: str, option: str = "2") -> None:
    """Make the layers follow a policy; call again at a stage that changes it. Raises ValueError for an unknown one."""
    run: Callable[..., torch.Tensor] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    if (mode, option) == ("selective", "op"):
        run = partial(run, context_fn=partial(create_selective_checkpoint_contexts, _keep_products))
    for index, layer in model.layers.items():
        layer.recompute = run if recomputes(int(index), mode, option) else None  # type: ignore[assignment]
