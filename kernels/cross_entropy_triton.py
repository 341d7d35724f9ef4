"""Triton kernels over a tile of logits: the statistics of its rows in one pass, then its gradient in one pass.

The products around them stay with the vendor's matrix library: with 1024 tokens a chunk they are the whole cost, and
no Triton matrix kernel reaches its rate on every architecture."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from megastage.kernels.launch import settings_for
from megastage.kernels.linear_cross_entropy import IGNORE, Rows
from megastage.kernels.registry import GateCase
from megastage.kernels.tuning import table

DEFAULT = {"block": 4096, "num_warps": 8}


@triton.jit
def cross_entropy_statistics_kernel(
    logits_ptr, labels_ptr, peak_ptr, sums_ptr, W, first, IGNORE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    # every lane keeps its own running maximum and sum, so that the loop has no reduction across the row
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, W, BLOCK):
        inside = start + cols < W
        x = tl.load(logits_ptr + row * W + start + cols, inside, float("-inf")).to(tl.float32)
        top = tl.maximum(peak, x)
        # a lane that has seen nothing but -inf stays at sum 0: -inf - -inf would be NaN
        base = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(peak - base) + tl.exp(x - base)
        peak = top
    row_peak = tl.max(peak, 0)
    row_base = tl.where(row_peak == float("-inf"), 0.0, row_peak)
    label = tl.load(labels_ptr + row)
    column = label - first
    here = (label != IGNORE) & (column >= 0) & (column < W)
    target = tl.load(logits_ptr + row * W + column, here, 0.0).to(tl.float32)
    tl.store(peak_ptr + row, row_peak)
    tl.store(sums_ptr + row * 3, tl.sum(total * tl.exp(peak - row_base), 0))
    tl.store(sums_ptr + row * 3 + 1, target)
    tl.store(sums_ptr + row * 3 + 2, here.to(tl.float32))


@triton.jit
def cross_entropy_gradient_kernel(
    logits_ptr, labels_ptr, peak_ptr, inverse_ptr, pull_ptr, grad_ptr, W, first,
    IGNORE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """WIDE: the type of the arithmetic, fp64 where the gradient is stored in fp32 (bound by memory either way)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < W
    peak = tl.load(peak_ptr + row)
    inverse = tl.load(inverse_ptr + row)
    pull = tl.load(pull_ptr + row)
    label = tl.load(labels_ptr + row)
    target = tl.where(label == IGNORE, -1, label - first)
    x = tl.load(logits_ptr + row * W + cols, inside, float("-inf")).to(WIDE)
    p = tl.exp(x - peak) * inverse
    grad = (p - tl.where(cols == target, 1.0, 0.0)) + p * pull
    tl.store(grad_ptr + row * W + cols, grad.to(grad_ptr.dtype.element_ty), inside)


def tile_statistics(logits_CW: Tensor, labels_C: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """As the reference of the same name in linear_cross_entropy."""
    C, W = logits_CW.shape
    peak_C = torch.empty(C, dtype=torch.float32, device=logits_CW.device)
    sums_C3 = torch.empty((C, 3), dtype=torch.float32, device=logits_CW.device)
    config = settings_for("cross_entropy_statistics", logits_CW, W, DEFAULT)
    with torch.cuda.device_of(logits_CW):
        cross_entropy_statistics_kernel[(C,)](
            logits_CW, labels_C.contiguous(), peak_C, sums_C3, W, first,
            IGNORE=IGNORE, BLOCK=_block(config, W), num_warps=config["num_warps"], enable_fp_fusion=True,
        )  # fmt: skip
    return peak_C, sums_C3


def tile_gradient(logits_CW: Tensor, labels_C: Tensor, first: int, stats: Rows, dtype: torch.dtype) -> Tensor:
    """As the reference of the same name in linear_cross_entropy."""
    C, W = logits_CW.shape
    grad_CW = logits_CW if logits_CW.dtype == dtype else torch.empty_like(logits_CW, dtype=dtype)
    config = settings_for("cross_entropy_gradient", logits_CW, W, DEFAULT)
    block = _block(config, W)
    with torch.cuda.device_of(logits_CW):
        cross_entropy_gradient_kernel[(C, triton.cdiv(W, block))](
            logits_CW, labels_C.contiguous(), *(x.contiguous() for x in stats), grad_CW, W, first,
            IGNORE=IGNORE, BLOCK=block, WIDE=tl.float64 if dtype == torch.float32 else tl.float32,
            num_warps=config["num_warps"], enable_fp_fusion=True,
        )  # fmt: skip
    return grad_CW


def _block(config: dict[str, int], W: int) -> int:
    return min(config["block"], max(32, triton.next_power_of_2(W)))


def gate_cases(arch: str) -> list[GateCase]:
    def call(W: int, dtype: torch.dtype = torch.bfloat16) -> None:
        logits, labels = torch.zeros(16, W), torch.zeros(16, dtype=torch.int64)
        peak, sums = tile_statistics(logits, labels, 0)
        tile_gradient(logits, labels, 0, Rows(peak, sums[:, 0], sums[:, 1]), dtype)

    sizes = {*table.dims("cross_entropy_statistics", arch, 131072), *table.dims("cross_entropy_gradient", arch)}
    wide = GateCase("fp32 w131072", partial(call, 131072, torch.float32), fast=False, exact=True)
    return [*(GateCase(f"w{W}", partial(call, W)) for W in sorted(sizes)), wide]
