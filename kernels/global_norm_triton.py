"""Triton kernel of the global norm: each part of each tensor gives one fp32 partial sum; no atomics, so the same
numbers give the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from megastage.kernels import multi_tensor
from megastage.kernels.launch import settings_for
from megastage.kernels.registry import GateCase

DEFAULT = {"block": 8192, "num_warps": 8}
TL_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def sum_of_squares_kernel(
    addresses_ptr, parts_ptr, partial_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    part = tl.program_id(0)
    tensor = tl.load(parts_ptr + part * 3)
    first = tl.load(parts_ptr + part * 3 + 1)
    left = tl.load(parts_ptr + part * 3 + 2)
    x_ptr = tl.load(addresses_ptr + tensor).to(tl.pointer_type(DTYPE)) + first
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
    lane = tl.arange(0, BLOCK)
    if left == BLOCK:  # most parts: no mask, or the loads could not be wide
        x = tl.load(x_ptr + lane).to(tl.float32)
    else:
        x = tl.load(x_ptr + lane, lane < left, 0.0).to(tl.float32)
    tl.store(partial_ptr + part, tl.sum(x * x, 0))


def partial_sums(tensors: Sequence[Tensor]) -> Tensor:
    """fp32 sums of squares of all parts of non-empty tensors that share dtype and device."""
    config = settings_for("global_norm", tensors[0], 0, DEFAULT)
    table = multi_tensor.build([tensors], config["block"])
    partial = torch.empty(table.parts.shape[0], dtype=torch.float32, device=tensors[0].device)
    with torch.cuda.device_of(partial):
        sum_of_squares_kernel[(table.parts.shape[0],)](
            table.addresses, table.parts, partial, DTYPE=TL_TYPES[tensors[0].dtype], ALIGNED=table.aligned,
            BLOCK=config["block"], num_warps=config["num_warps"], enable_fp_fusion=True,
        )  # fmt: skip
    return partial


def gate_cases(arch: str) -> list[GateCase]:
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    return [
        GateCase(name, partial(partial_sums, [torch.zeros(65536, dtype=dtype)]), fast=name == "bf16")
        for name, dtype in dtypes.items()
    ]
