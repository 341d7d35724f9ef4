"""Triton kernel of rotary embedding: one program a token rotates its query and key heads with one read of the angles.
Backward is the same kernel with the opposite angle. Every tensor is read through its own strides (only the last is 1),
so slices of a fused projection need no copy."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from megastage.kernels.launch import settings_for
from megastage.kernels.registry import GateCase
from megastage.kernels.tuning import table

DEFAULT = {"heads": 16, "num_warps": 4}


@triton.jit
def _rotate(
    x_ptr, out_ptr, heads, x_head_stride, out_head_stride, cos, sin, half, in_half,
    F: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & in_half[None, :]
        x = x_ptr + head.to(tl.int64)[:, None] * x_head_stride + half[None, :]
        low = tl.load(x, inside, 0.0).to(tl.float32)
        high = tl.load(x + F, inside, 0.0).to(tl.float32)
        out = out_ptr + head.to(tl.int64)[:, None] * out_head_stride + half[None, :]
        dtype = out_ptr.dtype.element_ty
        tl.store(out, (low * cos[None, :] - high * sin[None, :]).to(dtype), inside)
        tl.store(out + F, (high * cos[None, :] + low * sin[None, :]).to(dtype), inside)


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, T, P, H, K,
    q_b, q_t, q_h, k_b, k_t, k_h, qo_b, qo_t, qo_h, ko_b, ko_t, ko_h, position_b, position_t, table_stride,
    F: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    b = (token // T).to(tl.int64)
    t = (token % T).to(tl.int64)
    half = tl.arange(0, BLOCK)
    in_half = half < F
    position = tl.load(positions_ptr + b * position_b + t * position_t).to(tl.int64)
    # a position outside the table turns the token into NaN rather than reading foreign memory
    spread = position + tl.zeros([BLOCK], tl.int64)  # a mask of one element is none to Triton 3.9's interpreter
    known = (spread >= 0) & (spread < P)
    angle = position * table_stride + half
    cos = tl.load(cos_ptr + angle, in_half & known, float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + angle, in_half & known, float("nan")).to(tl.float32)
    if INVERSE:
        sin = -sin
    _rotate(q_ptr + b * q_b + t * q_t, q_out_ptr + b * qo_b + t * qo_t, H, q_h, qo_h, cos, sin, half, in_half, F, HEADS)
    _rotate(
        k_ptr + b * k_b + t * k_t, k_out_ptr + b * ko_b + t * ko_t, K, k_h, ko_h, cos, sin, half, in_half, F, KV_HEADS
    )


def rotate(
    q_BTHD: Tensor, k_BTKD: Tensor, cos_PF: Tensor, sin_PF: Tensor, positions_BT: Tensor, inverse: bool,
    q_out: Tensor, k_out: Tensor,
) -> None:  # fmt: skip
    """Rotate into `q_out` and `k_out`, which may be q and k themselves."""
    q_BTHD, k_BTKD = _unit_stride(q_BTHD), _unit_stride(k_BTKD)
    B, T, H, D = q_BTHD.shape
    K, F = k_BTKD.shape[2], D // 2
    if q_BTHD.numel() + k_BTKD.numel() == 0:
        return
    config = settings_for("rope", q_BTHD, D, DEFAULT)
    with torch.cuda.device_of(q_BTHD):
        rope_kernel[(B * T,)](
            q_BTHD, k_BTKD, q_out, k_out, cos_PF, sin_PF, positions_BT, T, cos_PF.shape[0], H, K,
            *q_BTHD.stride()[:3], *k_BTKD.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
            *positions_BT.stride(), cos_PF.stride(0),
            F=F, BLOCK=triton.next_power_of_2(F), HEADS=_heads(config, H), KV_HEADS=_heads(config, K),
            INVERSE=inverse, num_warps=config["num_warps"], num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip


def _heads(config: dict[str, int], heads: int) -> int:
    return min(config["heads"], triton.next_power_of_2(max(heads, 1)))


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def gate_cases(arch: str) -> list[GateCase]:
    def call(D: int, inverse: bool) -> None:
        q, k = (torch.zeros(1, 64, heads, D, dtype=torch.bfloat16) for heads in (32, 8))
        angles = torch.zeros(64, D // 2)
        rotate(q, k, angles, angles, torch.arange(64)[None], inverse, q, k)

    return [
        GateCase(f"d{D}{' backward' if inverse else ''}", partial(call, D, inverse), fast=D in (64, 128))
        for D, inverse in product(table.dims("rope", arch, 64, 80, 128), (False, True))
    ]
