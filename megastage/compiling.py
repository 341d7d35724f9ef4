"""torch.compile, layer by layer: equal layers share a compilation; a stage with other shapes compiles its own.

What is compiled lies inside the modules that FSDP hooks, so that gathering and freeing stay outside of the graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch._dynamo
from torch import Tensor

from megastage import recompute
from megastage.config.schema import Config
from megastage.loss import ModelPart
from megastage.model.decoder import DecoderLayer
from megastage.stages import Stage

_VARIANTS = 8  # of one shape: with and without gradients, recomputed or not, first graphs after a break


def allow_for(stages: Iterable[Stage], n_layers: int) -> None:
    """Set the compiler's limits so that they cover every stage; beyond them it would silently run uncompiled.

    Shapes are compiled as they are (`document bounds` apart, see `apply`): a stage's kernels know its sequence length.
    """
    settings = torch._dynamo.config
    shapes = len({(stage.seq_len, stage.micro_batch_size, stage.context_parallel_degree) for stage in stages})
    limit = _VARIANTS * (shapes + 1) * (n_layers + 1)
    settings.recompile_limit = max(settings.recompile_limit, limit)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 4 * limit)
    settings.fail_on_recompile_limit_hit = True
    settings.automatic_dynamic_shapes = False


def require_backend(name: str) -> None:
    """Raise ValueError for a compile.backend that torch does not have."""
    if name not in torch._dynamo.list_backends(exclude_tags=()):
        useful = ", ".join(torch._dynamo.list_backends())
        raise ValueError(f'compile.backend = "{name}": torch has no such back end; use one of {useful}')


def apply(cfg: Config, part: ModelPart, stage: Stage) -> None:
    """Compile the parts that compile.components names; call again at a stage boundary, after `recompute.apply`."""
    table = cfg.compile
    if not table.enable:
        return
    # in one graph or not at all: at a break the rest would run as it stands, with no word of it
    compiled = partial(torch.compile, backend=table.backend, fullgraph=True)
    if "model" in table.components:
        for layer in part.decoder.layers.values():
            assert isinstance(layer, DecoderLayer)
            _compile_layer(layer, compiled, recompute.by_operation(*stage.recompute))
    if "loss" in table.components:
        part.compiled_head = compiled(part.head)


def _compile_layer(layer: DecoderLayer, compiled: Callable[..., Callable[..., Tensor]], by_operation: bool) -> None:
    """A choice by operation is the compiler's to see; recomputing a whole layer goes around what is compiled."""
    if by_operation and layer.recompute is not None:
        checkpointed, layer.recompute = layer.recompute, None
        layer.body = _bounds_vary(compiled(partial(checkpointed, layer.plain_body)))
    else:
        layer.body = _bounds_vary(compiled(layer.plain_body))


def _bounds_vary(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The number of document bounds is the one size that changes from batch to batch: compile for any."""

    def call(x_BTD: Tensor, positions_BT: Tensor, cu_seqlens_BC: Tensor | None) -> Tensor:
        if cu_seqlens_BC is not None:
            torch._dynamo.maybe_mark_dynamic(cu_seqlens_BC, 1)
        return run(x_BTD, positions_BT, cu_seqlens_BC)

    return call
