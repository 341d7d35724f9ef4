"""Activation recomputation: which layers recompute what in backward (Chen et al. 2016; Korthikanti et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megastage.model.decoder import Decoder, DecoderLayer
from megastage.model.recompute_plan import recomputes

_aten = torch.ops.aten
_MATMULS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default}
_KEPT = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}


def apply(
    decoder: Decoder,
    mode: str,
    option: str,
    *,
    preserve_rng_state: bool,
    early_stop: bool,
    determinism_check: str = "default",
    debug: bool = False,
) -> None:
    """Set every layer's recomputation; may be called again at a stage boundary.

    mode "none": keep everything. "full": each layer keeps its input only. "selective" with a number n: full on every
    n-th layer; with "op": keep attention, reduce-scatters and every second matrix product, recompute the rest.
    The other arguments are those of torch.utils.checkpoint.checkpoint. Raises ValueError for an unknown mode or option.
    """
    run: Callable[..., Tensor] = partial(
        checkpoint,
        use_reentrant=False,
        preserve_rng_state=preserve_rng_state,
        early_stop=early_stop,
        determinism_check=determinism_check,
        debug=debug,
    )
    if by_operation(mode, option):
        run = partial(run, context_fn=_selective_contexts)
    for position, layer in enumerate(decoder.layers.values()):
        assert isinstance(layer, DecoderLayer)
        layer.recompute = run if recomputes(position, mode, option) else None


def by_operation(mode: str, option: str) -> bool:
    """Whether a layer keeps some of its operations' results instead of none."""
    return (mode, option) == ("selective", "op")


def _selective_contexts() -> Any:
    """Contexts of one layer call; the count of matrix products starts anew in forward and in recomputation."""
    seen = {False: 0, True: 0}

    def policy(ctx: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        keep = op in _KEPT or (op.namespace == "megastage" and "attention" in op.name())
        if op in _MATMULS:
            seen[ctx.is_recompute] += 1
            keep = seen[ctx.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
