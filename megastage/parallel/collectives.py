"""Differentiable collectives of Megatron-style sequence parallelism (Korthikanti et al. 2022, section 4.2.2).

Tensors are [B, T, ...]; the sequence dimension is 1. The functional collectives are used, so that torch.compile can
trace through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import _functional_collectives as functional

# torch 2.13 renamed both; 2.11 and 2.12 have the old names only
_all_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter_sum = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor


def _begin_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Start to gather; `_end_gather` waits for the result."""
    return _all_gather(x.contiguous().flatten(0, 1), 0, group)


def _end_gather(flat: Tensor, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    B, rest = x.shape[0], x.shape[2:]
    return _wait(flat).view(group.size(), B, -1, *rest).transpose(0, 1).reshape(B, -1, *rest)


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, T/n, ...] on each rank -> [B, T, ...] on all."""
    return _end_gather(_begin_gather(x, group), x, group)


def _begin_reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    n, (B, T), rest = group.size(), x.shape[:2], x.shape[2:]
    blocks = x.view(B, n, T // n, *rest).transpose(0, 1).reshape(n * B * (T // n), *rest)
    return _reduce_scatter_sum(blocks, "sum", 0, group)


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Partial sums [B, T, ...] -> this rank's [B, T/n, ...] of the total."""
    shape = (x.shape[0], x.shape[1] // group.size(), *x.shape[2:])
    return _wait(_begin_reduce_scatter(x, group)).view(shape)


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


class _GatherProject(torch.autograd.Function):
    """Gather, then several linear maps. Backward gathers again rather than keep [B, T, D], behind other work."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.save_for_backward(x, *weights)
        whole = _gather(x, group)
        return tuple(F.linear(whole, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        gathered = _begin_gather(x, ctx.group)
        grad_whole = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:]):
            grad_whole = grad_whole + grad @ weight
        scattered = _begin_reduce_scatter(grad_whole, ctx.group)
        whole = _end_gather(gathered, x, ctx.group).flatten(0, 1)
        grad_weights = [grad.flatten(0, 1).mT @ whole for grad in grads]
        return _wait(scattered).view(x.shape), None, *grad_weights


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _wait(functional.all_reduce(x, "sum", group))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group, on every rank. Each rank's backward is of its own addend: all of them start one."""
    return _Sum.apply(x, group)


def gather_project(x: Tensor, weights: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """x [B, T/n, D] gathered along the sequence, times each weight [O, D] transposed: [B, T, O] each.

    Only this rank's share of x is kept for backward.
    """
    return _GatherProject.apply(x, group, *weights)


def gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather [B, T/n, ...] along the sequence; backward reduce-scatters."""
    return x if group.size() == 1 else _GatherSequence.apply(x, group)


def reduce_scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum [B, T, ...] over the group and keep this rank's part of the sequence; backward all-gathers."""
    return x if group.size() == 1 else _ReduceScatterSequence.apply(x, group)
