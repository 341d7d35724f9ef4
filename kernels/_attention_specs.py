"""Every attention kernel that ships, as arguments for an offline compile: what the tuning table makes the launcher run.

Masks are data to these kernels, so one of each per architecture, element type and head dimension covers causal, full,
documents and windows; only softcap and sink are compiled in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import triton

from megastage.kernels import _attention_tuning as tuning
from megastage.kernels._attention_backward import attention_delta_kernel, attention_dkv_kernel, attention_dq_kernel
from megastage.kernels._attention_common import intervals_kernel
from megastage.kernels._attention_forward import attention_forward_kernel

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
HEAD_DIMS = (64, 80, 96, 128, 256)
_KERNELS = {"forward": attention_forward_kernel, "dq": attention_dq_kernel, "dkv": attention_dkv_kernel}
_FP32 = ("LSE", "SINK", "LSE2", "DELTA", "DLSE")
_INT32 = ("LOW", "HIGH", "CU")


def specs(
    architectures: Sequence[str] = ARCHITECTURES,
    head_dims: Sequence[int] = HEAD_DIMS,
    dtypes: Sequence[str] = ("bf16",),
    *,
    softcap: bool = False,
    sink: bool = False,
) -> list[dict[str, Any]]:
    """Dictionaries with name, fn, signature, constexprs, sm (80, 90, 100 or "gfx942"), num_warps, num_stages, options.

    Signature strings are "<type>" or "<type>:16" (divisible by 16, as aligned pointers and strides are at run time).
    """
    found = []
    for arch in architectures:
        for dtype in dtypes:
            for D in head_dims:
                found += [_main(kernel, arch, dtype, D, softcap, sink) for kernel in tuning.KERNELS]
                found.append(_delta(arch, dtype, D))
        found += list(_intervals(arch))
    return found


def _main(kernel: str, arch: str, dtype: str, D: int, softcap: bool, sink: bool) -> dict[str, Any]:
    width = max(16, triton.next_power_of_2(D))
    tiles = tuning.lookup(kernel, arch, 32 if dtype == "fp32" else 16, width, softcap, width > D)
    constexprs = {
        "D": D, "BLOCK_D": width, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "CUT": tiles.cut,
        "SOFTCAP": softcap, "TMA": tiles.tma, "PRECISION": tuning.precision(arch, dtype == "fp32"),
    }  # fmt: skip
    if kernel == "forward":
        constexprs["HAS_SINK"] = sink
    rows = tiles.block_m if kernel == "dkv" else tiles.block_n
    absent = () if sink else ("SINK",)
    signature = _signature(_KERNELS[kernel], constexprs, dtype, absent)
    for name in signature:
        if name.endswith("_DESC"):
            signature[name] = f"tensordesc<{dtype}[{rows},{width}]>" if tiles.tma else "None"
    label = f"attention_{kernel} {arch} {dtype} D{D}" + " softcap" * softcap + " sink" * sink
    return {
        "name": label, "fn": _KERNELS[kernel], "signature": signature, "constexprs": constexprs, "sm": _target(arch),
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, **dict(tiles.options),
    }  # fmt: skip


def _delta(arch: str, dtype: str, D: int) -> dict[str, Any]:
    width = max(16, triton.next_power_of_2(D))
    constexprs = {"D": D, "BLOCK_D": width, "BLOCK_M": 64, "HAS_DLSE": True, "LONE": False}
    return {
        "name": f"attention_delta {arch} {dtype} D{D}", "fn": attention_delta_kernel,
        "signature": _signature(attention_delta_kernel, constexprs, dtype, ()), "constexprs": constexprs,
        "sm": _target(arch), "num_warps": 4, "num_stages": 2,
    }  # fmt: skip


def _intervals(arch: str) -> Iterator[dict[str, Any]]:
    for side in (False, True):
        constexprs = {"STEPS": 6, "CAUSAL": True, "WINDOWED": True, "FOR_KEYS": side, "BLOCK": 256}
        yield {
            "name": f"attention_intervals {arch} {'keys' if side else 'queries'}", "fn": intervals_kernel,
            "signature": _signature(intervals_kernel, constexprs, "bf16", ()), "constexprs": constexprs,
            "sm": _target(arch), "num_warps": 4, "num_stages": 2,
        }  # fmt: skip


def _signature(kernel: Any, constexprs: dict[str, Any], dtype: str, absent: Sequence[str]) -> dict[str, str]:
    signature = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name in absent:
            signature[name] = "None"
        elif name in _FP32 or name in _INT32:
            signature[name] = "*fp32:16" if name in _FP32 else "*i32:16"
        elif name in ("scale", "softcap"):
            signature[name] = "fp32"
        elif name.startswith("stride_") or name in ("T", "S"):
            signature[name] = "i32:16"
        elif name.isupper() and name not in ("H", "GROUPS"):
            signature[name] = f"*{dtype}:16"
        else:
            signature[name] = "i32"
    return signature


def _target(arch: str) -> int | str:
    # the 8.6 generation runs what is compiled for 8.0; only its shared memory is smaller, which the table respects
    return arch if arch.startswith("gfx") else {"sm_86": 80}.get(arch) or int(arch[3:])
