"""Triton kernel of AdamW: one launch updates a list of flat shards, each element read and written once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from megastage.kernels import multi_tensor
from megastage.kernels.global_norm_triton import TL_TYPES
from megastage.kernels.launch import settings_for
from megastage.kernels.registry import GateCase

DEFAULT = {"block": 1024, "num_warps": 4}


@triton.jit
def _mix(x):
    """lowbias32 of Wellons' hash-prospector (public domain): 32 bits to 32 well mixed ones."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _load(ptr, lane, left, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(ptr + lane, lane < left, 0.0)
    else:
        x = tl.load(ptr + lane)
    return x.to(tl.float32)


@triton.jit
def _store(ptr, lane, left, value, random, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr):
    if STOCHASTIC and ptr.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        # a NaN may keep its payload in the half that is cut off, and would become infinite
        nan_bit = tl.where((bits & 0x7FFFFF) != 0, 0x400000, 0).to(tl.uint32)
        bits = tl.where(finite, bits + random, bits | nan_bit)
        out = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        out = value.to(ptr.dtype.element_ty)
    if MASKED:
        tl.store(ptr + lane, out, lane < left)
    else:
        tl.store(ptr + lane, out)


@triton.jit
def _update(
    param_ptr, grad_ptr, mean_ptr, square_ptr, lane, left, scale, word,
    rate, keep, pull1, beta2, pull2, eps, root_correction2, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    param = _load(param_ptr, lane, left, MASKED)
    grad = _load(grad_ptr, lane, left, MASKED) * scale
    mean = _load(mean_ptr, lane, left, MASKED)
    square = _load(square_ptr, lane, left, MASKED)
    mean += (grad - mean) * pull1
    square = square * beta2 + (grad * grad) * pull2
    denominator = tl.sqrt_rn(square) / root_correction2 + eps
    param = param * keep - rate * (mean / denominator)
    random = _mix(word)
    more = _mix(random ^ 0x9E3779B9)
    _store(param_ptr, lane, left, param, random & 0xFFFF, STOCHASTIC, MASKED)
    _store(mean_ptr, lane, left, mean, random >> 16, STOCHASTIC, MASKED)
    _store(square_ptr, lane, left, square, more & 0xFFFF, STOCHASTIC, MASKED)


@triton.jit(do_not_specialize=["seed"])
def adamw_kernel(
    addresses_ptr, parts_ptr, scale_ptr, rate, keep, pull1, beta2, pull2, eps, root_correction2, seed,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, STOCHASTIC: tl.constexpr, SCALED: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    tensor = tl.load(parts_ptr + part * 3)
    first = tl.load(parts_ptr + part * 3 + 1)
    left = tl.load(parts_ptr + part * 3 + 2)
    param_ptr = tl.load(addresses_ptr + tensor * 4).to(tl.pointer_type(PARAM)) + first
    grad_ptr = tl.load(addresses_ptr + tensor * 4 + 1).to(tl.pointer_type(GRAD)) + first
    mean_ptr = tl.load(addresses_ptr + tensor * 4 + 2).to(tl.pointer_type(STATE)) + first
    square_ptr = tl.load(addresses_ptr + tensor * 4 + 3).to(tl.pointer_type(STATE)) + first
    if ALIGNED:
        param_ptr = tl.multiple_of(param_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        mean_ptr = tl.multiple_of(mean_ptr, 16)
        square_ptr = tl.multiple_of(square_ptr, 16)
    lane = tl.arange(0, BLOCK)
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr).to(tl.float32)
    # one word per element of the shard: its number, mixed with the seed and the tensor's place in the list
    element = first + lane
    word = (element & 0xFFFFFFFF).to(tl.uint32)
    word ^= _mix((element >> 32).to(tl.uint32) ^ _mix(seed.to(tl.uint32) + tensor.to(tl.uint32) * 0x9E3779B9))
    if left == BLOCK:
        _update(
            param_ptr, grad_ptr, mean_ptr, square_ptr, lane, left, scale, word,
            rate, keep, pull1, beta2, pull2, eps, root_correction2, STOCHASTIC, False,
        )  # fmt: skip
    else:
        _update(
            param_ptr, grad_ptr, mean_ptr, square_ptr, lane, left, scale, word,
            rate, keep, pull1, beta2, pull2, eps, root_correction2, STOCHASTIC, True,
        )  # fmt: skip


def step_(
    params: Sequence[Tensor], grads: Sequence[Tensor], means: Sequence[Tensor], squares: Sequence[Tensor],
    scale: Tensor | None, scalars: tuple[float, ...], stochastic: bool, seed: int,
) -> None:  # fmt: skip
    """Update non-empty tensors whose dtypes are alike within each list; `scalars` as `optimizer.step_scalars`."""
    config = settings_for("adamw", params[0], 0, DEFAULT)
    table = multi_tensor.build([params, grads, means, squares], config["block"])
    with torch.cuda.device_of(params[0]):
        adamw_kernel[(table.parts.shape[0],)](
            table.addresses, table.parts, scale, *scalars, seed,
            PARAM=TL_TYPES[params[0].dtype], GRAD=TL_TYPES[grads[0].dtype], STATE=TL_TYPES[means[0].dtype],
            STOCHASTIC=stochastic, SCALED=scale is not None, ALIGNED=table.aligned, BLOCK=config["block"],
            num_warps=config["num_warps"], enable_fp_fusion=True,
        )  # fmt: skip


def gate_cases(arch: str) -> list[GateCase]:
    def call(dtype: torch.dtype, stochastic: bool) -> None:
        flat = [torch.zeros(65536, dtype=dtype)]
        step_(flat, flat, flat, flat, torch.ones(()), (0.5,) * 7, stochastic, 7)

    forms = (("fp32", torch.float32, False), ("bf16 stochastic", torch.bfloat16, True))
    return [GateCase(name, partial(call, dtype, stochastic)) for name, dtype, stochastic in forms]
