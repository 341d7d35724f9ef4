"""AdamW (Loshchilov & Hutter 2019) in place over lists of flat shards, with bf16 storage that does not stall.

An update smaller than half a bf16 step is lost by rounding to nearest; stochastic rounding (up or down with the
probability that keeps the mean) keeps it on average, so parameters and states can live in bf16."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from megastage.kernels.dispatch import KERNEL_DTYPES, one_device, use_triton

MASK32 = 0xFFFFFFFF


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    grad_scale: Tensor | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    backend: str = "auto",
) -> None:
    """One AdamW update, in place, as torch.optim.AdamW makes it; arithmetic in fp32 (fp64 for fp64 parameters).

    params ... exp_avg_sqs: contiguous tensors of matching sizes (local shards), any mix of dtypes over the list.
    step: 1 for the first update. Of it and `lr` a tensor's value is taken, which on a GPU waits for it.
    grad_scale: scalar tensor that multiplies the gradients (the clip coefficient), so that clipping costs no pass of
    its own. stochastic_rounding: of what is stored in bf16; `seed` (0 to 2^31 - 1) must differ from step to step and
    from rank to rank, and then an update is reproducible bit for bit.
    """
    _check_tensors((params, grads, exp_avgs, exp_avg_sqs), grad_scale)
    _check_numbers(step, betas, eps, seed)
    scalars = step_scalars(int(step), float(lr), betas, eps, weight_decay)
    groups: dict[tuple[torch.dtype, ...], list[tuple[Tensor, ...]]] = defaultdict(list)
    for row in zip(params, grads, exp_avgs, exp_avg_sqs):
        if row[0].numel():
            groups[tuple(x.dtype for x in row)].append(row)
    for number, (dtypes, rows) in enumerate(groups.items()):
        p, g, m, v = (list(column) for column in zip(*rows))
        device, odd = rows[0][0].device, [dtype for dtype in dtypes if dtype not in KERNEL_DTYPES]
        update = adamw_op if use_triton(backend, device, "optimizer", (odd or dtypes)[0]) else adamw_reference_
        update(p, g, m, v, grad_scale, scalars, stochastic_rounding, (seed + 7919 * number) % 2**31)


def step_scalars(step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> list[float]:
    """[lr / correction1, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, eps, sqrt(correction2)], made in fp64."""
    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    scalars = lr / correction1, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps, correction2**0.5
    return [float(x) for x in scalars]


def adamw_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grad_scale: Tensor | None,
    scalars: Sequence[float],
    stochastic: bool,
    seed: int,
) -> None:
    """The update tensor by tensor; its stochastic rounding draws the kernel's numbers."""
    rate, keep, pull1, beta2, pull2, eps, root_correction2 = scalars
    for place, row in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
        param, grad, mean, square = (x.view(-1) for x in row)
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        g, m, v, p = grad.to(wide), mean.to(wide), square.to(wide), param.to(wide)
        if grad_scale is not None:
            g = g * grad_scale.to(wide).view(())
        m = m + (g - m) * pull1
        v = v * beta2 + (g * g) * pull2
        p = p * keep - rate * (m / (v.sqrt() / root_correction2 + eps))
        if stochastic and torch.bfloat16 in (param.dtype, mean.dtype, square.dtype):
            random, more = random_words(param.numel(), place, seed, param.device)
            parts = (random & 0xFFFF, random >> 16, more & 0xFFFF)
            p, m, v = (_round(x, r, out.dtype) for x, r, out in zip((p, m, v), parts, (param, mean, square)))
        for out, value in ((param, p), (mean, m), (square, v)):
            out.copy_(value)


def random_words(count: int, place: int, seed: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Two 32-bit words (int64 tensors) for each of the first `count` elements of the tensor at `place` in a list."""
    element = torch.arange(count, device=device)
    base = torch.tensor((seed + place * 0x9E3779B9) & MASK32, device=device)
    first = _mix((element & MASK32) ^ _mix((element >> 32) ^ _mix(base)))
    return first, _mix(first ^ 0x9E3779B9)


def _mix(x: Tensor) -> Tensor:
    """lowbias32 of Wellons' hash-prospector (public domain) on 32-bit words held in int64."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & MASK32
    return x ^ (x >> 15)


def _round(value: Tensor, random: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 to bf16 with 16 random bits added below the cut; other dtypes are left to the copy."""
    if dtype != torch.bfloat16 or value.dtype != torch.float32:
        return value
    bits = (value.contiguous().view(torch.int32) + random.view(value.shape).to(torch.int32)) & ~0xFFFF
    return torch.where(value.isfinite(), bits.view(torch.float32), value)


def _check_tensors(lists: Sequence[Sequence[Tensor]], grad_scale: Tensor | None) -> None:
    sizes = [[x.numel() for x in tensors] for tensors in lists]
    if any(size != sizes[0] for size in sizes):
        raise ValueError("params, grads, exp_avgs and exp_avg_sqs must match in length and in elements of each tensor")
    everything = [x for tensors in lists for x in tensors]
    if not all(x.is_contiguous() for x in everything):
        raise ValueError("adamw_ takes contiguous tensors: pass the flat local shards")
    if odd := {str(x.dtype) for x in everything if not x.is_floating_point()}:
        raise ValueError(f"adamw_ takes tensors of floating-point numbers, not {', '.join(sorted(odd))}")
    if any(m.dtype != v.dtype for m, v in zip(lists[2], lists[3])):
        raise ValueError("exp_avg and exp_avg_sq of a parameter must share one dtype")
    if grad_scale is not None and grad_scale.numel() != 1:
        raise ValueError(f"grad_scale must be one number, not {tuple(grad_scale.shape)}")
    one_device("adamw_", everything if grad_scale is None else [*everything, grad_scale])


def _check_numbers(step: int | Tensor, betas: tuple[float, float], eps: float, seed: int) -> None:
    if step < 1 or not 0 <= seed < 2**31:
        raise ValueError(f"step = {step} must be at least 1 and seed = {seed} between 0 and 2^31 - 1")
    if not all(0 <= beta < 1 for beta in betas) or not eps >= 0:
        raise ValueError(f"betas = {betas} must lie in [0, 1) and eps = {eps} must not be negative")


@torch.library.custom_op("megastage::adamw", mutates_args=("params", "exp_avgs", "exp_avg_sqs"))
def adamw_op(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    grad_scale: Tensor | None,
    scalars: Sequence[float],
    stochastic: bool,
    seed: int,
) -> None:
    """The update of non-empty tensors in one launch; dtypes are alike within each list."""
    from megastage.kernels import optimizer_triton

    optimizer_triton.step_(params, grads, exp_avgs, exp_avg_sqs, grad_scale, tuple(scalars), stochastic, seed)


@adamw_op.register_fake
def _(params, grads, exp_avgs, exp_avg_sqs, grad_scale, scalars, stochastic, seed):
    return None
