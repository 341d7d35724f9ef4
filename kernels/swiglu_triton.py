"""Triton kernels of SwiGLU: one read and one write of each element; gate and up may be halves of one projection."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from megastage.kernels.launch import rows_of, settings_for
from megastage.kernels.registry import GateCase
from megastage.kernels.tuning import table

DEFAULT = {"block": 2048, "num_warps": 4}


@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, F, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < F
    gate = tl.load(gate_ptr + row * gate_stride + cols, inside, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, inside, 0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * F + cols, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def swiglu_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, F, grad_stride, gate_stride, up_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < F
    grad = tl.load(grad_ptr + row * grad_stride + cols, inside, 0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + cols, inside, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, inside, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    dtype = grad_gate_ptr.dtype.element_ty
    tl.store(grad_gate_ptr + row * F + cols, grad_gate.to(dtype), inside)
    tl.store(grad_up_ptr + row * F + cols, (grad * silu).to(dtype), inside)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    gate_NF, up_NF = rows_of(gate), rows_of(up)
    if out.numel():
        grid, block, warps = _launch("swiglu", gate_NF)
        with torch.cuda.device_of(gate):
            swiglu_forward_kernel[grid](
                gate_NF, up_NF, out, gate_NF.shape[1], gate_NF.stride(0), up_NF.stride(0),
                BLOCK=block, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    grad_NF, gate_NF, up_NF = rows_of(grad), rows_of(gate), rows_of(up)
    if grad_gate.numel():
        grid, block, warps = _launch("swiglu_backward", gate_NF)
        with torch.cuda.device_of(gate):
            swiglu_backward_kernel[grid](
                grad_NF, gate_NF, up_NF, grad_gate, grad_up, gate_NF.shape[1],
                grad_NF.stride(0), gate_NF.stride(0), up_NF.stride(0),
                BLOCK=block, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return grad_gate, grad_up


def _launch(op: str, x_NF: Tensor) -> tuple[tuple[int, int], int, int]:
    N, F = x_NF.shape
    config = settings_for(op, x_NF, F, DEFAULT)
    block = min(config["block"], max(32, triton.next_power_of_2(F)))
    return (N, triton.cdiv(F, block)), block, config["num_warps"]


def gate_cases(arch: str) -> list[GateCase]:
    def call(F: int) -> None:
        x = torch.zeros(16, F, dtype=torch.bfloat16)
        forward(x, x)
        backward(x, x, x)

    sizes = {*table.dims("swiglu", arch, 14336), *table.dims("swiglu_backward", arch)}
    return [GateCase(f"f{F}", partial(call, F)) for F in sorted(sizes)]
