"""What the attention kernels are launched with, for the offline gate.

Masks are data to these kernels: each case runs every mask, and all must need the same compiled kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megastage.kernels._attention_reference import Geometry
from megastage.kernels._attention_tuning import KERNELS
from megastage.kernels.registry import GateCase
from megastage.kernels.tuning import table

HEAD_DIMS = (64, 80, 96, 128, 256)
FAST_HEAD_DIMS = (64, 128)
HEADS = {"": (32, 8), "MHA": (32, 32), "MQA": (32, 1), "one head": (1, 1)}
TOKENS = 256
MASKS = ("causal", "documents", "full", "window", "offset")


def gate_cases(arch: str) -> list[GateCase]:
    """Every head dimension in bf16 with grouped heads first (the figures that count), then what may compile to other
    code: other heads, lengths and layouts, softcap, sink, fp16 and, without speed rules, fp32."""
    return [*_plain_cases(arch), *_other_cases()]


def _plain_cases(arch: str) -> Iterator[GateCase]:
    measured = {D for kernel in KERNELS for D in table.dims(f"attention_{kernel}", arch)}
    for D in sorted({*HEAD_DIMS, *measured}):
        yield GateCase(f"bf16 D{D}", partial(run, D=D), fast=D in FAST_HEAD_DIMS)


def _other_cases() -> Iterator[GateCase]:
    def case(name: str, exact: bool = False, **arguments: Any) -> GateCase:
        return GateCase(name, partial(run, **arguments), fast=False, form=True, exact=exact)

    for D in (64, 128, 256):
        for heads in ("MHA", "MQA", "one head"):
            yield case(f"bf16 D{D} {heads}", D=D, heads=heads)
    yield case("bf16 D128 odd length", D=128, tokens=TOKENS + 1)
    yield case("bf16 D128 one token", D=128, tokens=1)
    for layout in ("fused", "heads first", "far apart"):
        yield case(f"bf16 D128 {layout}", D=128, layout=layout)
    for D in (32, 72, 100, 192):  # below the table's smallest; copied to wider rows; padded to 256
        yield case(f"bf16 D{D}", D=D)
    for D in (64, 96, 128, 256):
        yield case(f"bf16 D{D} softcap", D=D, softcap=30.0)
    for D in (64, 128, 256):
        yield case(f"bf16 D{D} sink", D=D, sink=True)
        yield case(f"fp16 D{D}", D=D, dtype=torch.float16)
    for D in (64, 80, 128, 256):
        yield case(f"fp32 D{D}", D=D, dtype=torch.float32, exact=True)
    yield case("fp32 D64 softcap and sink", D=64, softcap=30.0, sink=True, dtype=torch.float32, exact=True)


def run(
    D: int, heads: str = "", tokens: int = TOKENS, layout: str = "", dtype: torch.dtype = torch.bfloat16,
    softcap: float = 0.0, sink: bool = False,
) -> None:  # fmt: skip
    """Forward and backward under every mask, with and without a gradient of lse."""
    from megastage.kernels import _attention_launch as launch

    q, k, v = _draw(tokens, D, heads, layout, dtype)
    logits = torch.zeros(q.shape[2], dtype=dtype) if sink else None
    for mask in MASKS:
        cu_seqlens = torch.tensor([[0, 1, tokens]], dtype=torch.int32) if mask == "documents" else None
        window, offset = (37 if mask == "window" else 0), (5 if mask == "offset" else 0)
        geometry = Geometry(mask != "full", D**-0.5, offset, window, softcap)
        out, lse, stats = launch.forward(q, k, v, cu_seqlens, logits, geometry)
        dlse = lse if mask == "full" else None
        launch.backward(out, dlse, q, k, v, out, lse, stats, cu_seqlens, logits, geometry)


def _draw(tokens: int, D: int, heads: str, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    H, K = HEADS[heads]
    if layout == "far apart":  # 64-bit strides from one batch element to the next, in memory that is never touched
        rows = 2**31 // (H * D) + tokens
        far = torch.empty(2 * rows * H * D, dtype=dtype)
        q, k, v = (far.as_strided((2, tokens, n, D), (rows * H * D, H * D, D, 1)) for n in (H, K, K))
    elif layout == "heads first":
        q, k, v = (torch.zeros(1, n, tokens, D, dtype=dtype).transpose(1, 2) for n in (H, K, K))
    else:
        q, k, v = torch.zeros(1, tokens, H + 2 * K, D, dtype=dtype).split((H, K, K), 2)
        if layout != "fused":
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return q, k, v
