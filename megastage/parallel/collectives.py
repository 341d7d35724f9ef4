"""Differentiable collectives of Megatron-style sequence parallelism (Korthikanti et al. 2022, section 4.2.2).

Tensors are [B, T, ...]; the sequence dimension is 1. The functional collectives are used, so that torch.compile can
trace through them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

# torch 2.13 renamed both; 2.11 and 2.12 have the old names only
_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter_sum = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T/n, ...] on each rank -> [B, T, ...] on all."""
    B, rest = x.shape[0], x.shape[2:]
    flat = _all_gather(x.contiguous().flatten(0, 1), 0, group)
    return _wait(flat).view(group.size(), B, -1, *rest).transpose(0, 1).reshape(B, -1, *rest)


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial sums [B, T, ...] -> this rank's [B, T/n, ...] of the total."""
    n, (B, T), rest = group.size(), x.shape[:2], x.shape[2:]
    blocks = x.view(B, n, T // n, *rest).transpose(0, 1).reshape(n * B * (T // n), *rest)
    return _wait(_reduce_scatter_sum(blocks, "sum", 0, group)).view(B, T // n, *rest)


def _wait(x: Tensor) -> Tensor:
    return x.wait() if isinstance(x, functional.AsyncCollectiveTensor) else x


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grads[0].contiguous(), ctx.group), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gather(grads[0], ctx.group), None


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather [B, T/n, ...] along the sequence; backward reduce-scatters."""
    return x if group.size() == 1 else _GatherSequence.apply(x, group)


def reduce_scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum [B, T, ...] over the group and keep this rank's part of the sequence; backward all-gathers."""
    return x if group.size() == 1 else _ReduceScatterSequence.apply(x, group)
