"""Triton kernels of RMSNorm. A tile is whole rows, [ROWS, BLOCK] with BLOCK the power of two above D, so a row's
statistics never leave registers and memory is read and written once; the weight's gradient is summed in registers over
a program's rows and then over programs, in a fixed order.

WIDE is the type of the arithmetic: fp32, and fp64 for fp32 rows and short ones (`statistics_dtype`). The pass is bound
by memory either way. Between it and storage values pass through fp32, as bf16 converts to and from nothing else."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from megastage.kernels.launch import multiprocessors, rows_of, settings_for, warps_for
from megastage.kernels.registry import GateCase
from megastage.kernels.rms_norm import statistics_dtype
from megastage.kernels.tuning import table

WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, rstd_ptr, N, x_stride, residual_stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], inside, 0.0).to(tl.float32).to(WIDE)
    dense = rows[:, None] * D + cols[None, :]
    if ADD:
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + cols[None, :], inside, 0.0)
        total = (x + residual.to(tl.float32).to(WIDE)).to(tl.float32).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + dense, total, inside)
        x = total.to(tl.float32).to(WIDE)  # normalise what was stored: backward sees the same numbers
    mean = tl.sum(x * x, 1) / D + eps
    if tl.float64 == WIDE:
        rstd = 1.0 / tl.sqrt(mean)
    else:
        rstd = 1.0 / tl.sqrt_rn(mean)
    weight = tl.load(weight_ptr + cols, cols < D, 0.0).to(tl.float32).to(WIDE)
    out = x * rstd[:, None] * weight[None, :]
    tl.store(out_ptr + dense, out.to(tl.float32).to(out_ptr.dtype.element_ty), inside)
    tl.store(rstd_ptr + rows, rstd, rows < N)


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr, grad_total_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr, N, tiles_per_program,
    grad_stride, grad_total_stride, x_stride,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + cols, cols < D, 0.0).to(tl.float32).to(WIDE)
    grad_weight = tl.zeros([ROWS, BLOCK], WIDE)
    for tile in range(tiles_per_program):
        rows = (program * tiles_per_program + tile) * ROWS + tl.arange(0, ROWS)
        inside = (rows < N)[:, None] & (cols < D)[None, :]
        grad = tl.load(grad_ptr + rows[:, None] * grad_stride + cols[None, :], inside, 0.0).to(tl.float32).to(WIDE)
        x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], inside, 0.0).to(tl.float32).to(WIDE)
        rstd = tl.load(rstd_ptr + rows, rows < N, 0.0)
        normed = x * rstd[:, None]
        grad_weight += grad * normed
        grad *= weight[None, :]
        mean = tl.sum(grad * normed, 1) / D
        grad_x = (grad - normed * mean[:, None]) * rstd[:, None]
        if ADD:
            offsets = rows[:, None] * grad_total_stride + cols[None, :]
            grad_x += tl.load(grad_total_ptr + offsets, inside, 0.0).to(tl.float32).to(WIDE)
        tl.store(
            grad_x_ptr + rows[:, None] * D + cols[None, :],
            grad_x.to(tl.float32).to(grad_x_ptr.dtype.element_ty),
            inside,
        )
    tl.store(partial_ptr + program * D + cols, tl.sum(grad_weight, 0), cols < D)


def _default(D: int, backward: bool) -> dict[str, int]:
    block = triton.next_power_of_2(D)
    rows = max(1, 1024 // block)
    return {"rows": rows, "num_warps": warps_for(rows * block, 8 if backward else 16)}


def forward(x: Tensor, residual: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, x + residual or an empty tensor, 1/rms of each row in fp32)."""
    D = x.shape[-1]
    x_ND, residual_ND = rows_of(x), None if residual is None else rows_of(residual)
    weight_D = weight_D.contiguous()
    N = x_ND.shape[0]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x.new_empty(0) if residual is None else torch.empty_like(out)
    rstd_N = torch.empty(N, dtype=statistics_dtype(x), device=x.device)
    if out.numel():
        config = settings_for("rms_norm", x, D, _default(D, backward=False))
        with torch.cuda.device_of(x):
            rms_norm_forward_kernel[(triton.cdiv(N, config["rows"]),)](
                x_ND, residual_ND, weight_D, out, total, rstd_N, N, x_ND.stride(0),
                0 if residual_ND is None else residual_ND.stride(0), eps,
                D=D, BLOCK=triton.next_power_of_2(D), ROWS=config["rows"], ADD=residual is not None,
                WIDE=WIDE[rstd_N.dtype], num_warps=config["num_warps"], num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
    return out, total, rstd_N


def backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight_D: Tensor, rstd_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by x and by the weight; `grad_total` (of x + residual) is added to the former."""
    D = x.shape[-1]
    grad_ND, x_ND, weight_D = rows_of(grad), rows_of(x), weight_D.contiguous()
    total_ND = None if grad_total is None else rows_of(grad_total)
    N = x_ND.shape[0]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if grad_x.numel() == 0:
        return grad_x, torch.zeros_like(weight_D)
    config = settings_for("rms_norm_backward", x, D, _default(D, backward=True))
    tiles = triton.cdiv(N, config["rows"])
    tiles_per_program = triton.cdiv(tiles, 4 * multiprocessors(x.device))
    programs = triton.cdiv(tiles, tiles_per_program)
    partial_PD = torch.empty((programs, D), dtype=statistics_dtype(x), device=x.device)
    with torch.cuda.device_of(x):
        rms_norm_backward_kernel[(programs,)](
            grad_ND, total_ND, x_ND, weight_D, rstd_N, grad_x, partial_PD, N, tiles_per_program,
            grad_ND.stride(0), 0 if total_ND is None else total_ND.stride(0), x_ND.stride(0),
            D=D, BLOCK=triton.next_power_of_2(D), ROWS=config["rows"], ADD=grad_total is not None,
            WIDE=WIDE[rstd_N.dtype], num_warps=config["num_warps"], num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return grad_x, partial_PD.sum(0).to(weight_D.dtype)


def gate_cases(arch: str) -> list[GateCase]:
    def call(D: int, add: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        x, weight = torch.zeros(64, D, dtype=dtype), torch.ones(D, dtype=dtype)
        rstd = forward(x, x if add else None, weight, 1e-5)[2]
        backward(x, x if add else None, x, weight, rstd)

    sizes = {*table.dims("rms_norm", arch, 128, 4096, 8192), *table.dims("rms_norm_backward", arch)}
    wide = [GateCase("d32", partial(call, 32, False), fast=False)]
    wide.append(GateCase("fp32 d4096 add", partial(call, 4096, True, torch.float32), fast=False, exact=True))
    return wide + [
        GateCase(f"d{D}{' add' if add else ''}", partial(call, D, add), fast=(D, add) in ((128, False), (4096, True)))
        for D, add in product(sorted(sizes), (False, True))
    ]
