"""Host side of the attention kernels: layouts, tiles, descriptors and grids."""

from __future__ import annotations

import contextlib
import os

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megastage.kernels import _attention_backward as backward_kernels
from megastage.kernels import _attention_tuning as tuning
from megastage.kernels._attention_common import document_intervals_kernel
from megastage.kernels._attention_forward import attention_forward_kernel
from megastage.kernels._attention_reference import Geometry, sink_gradient

INTERPRETED = not isinstance(attention_forward_kernel, triton.runtime.JITFunction)
INTERVAL_BLOCK = 256
DELTA_BLOCK = 64
# Offsets inside a tile are 32-bit: a row stride may not exceed this.
MAX_ROW_STRIDE = 2**31 // 256 - 1


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, sink: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, D], lse fp32 [B, H, T])."""
    B, T, H, D = q.shape
    S = k.shape[1]
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    if q.numel() == 0 or S == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    q, k, v = (_rows(x) for x in (q, k, v))
    tiles = _tiles("forward", q, (k, v))
    shared = _shared(geometry, cu_seqlens, D, tiles, q.dtype)
    with _device(q):
        low, high = intervals(cu_seqlens, T, S, geometry, for_keys=False)
        attention_forward_kernel[(triton.cdiv(T, tiles.block_m) * B * H,)](
            q, k, v, *_descriptors((k, v), tiles.block_n, tiles.tma), out, lse,
            None if sink is None else sink.float().contiguous(), low, high,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            T, S, H, H // k.shape[2], geometry.q_offset, geometry.window, geometry.scale, geometry.softcap,
            HAS_SINK=sink is not None, **shared,
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, sink: Tensor | None, geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dsink); dsink is empty without a sink."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dsink = q.new_zeros(0) if sink is None else torch.zeros_like(sink)
    if q.numel() == 0 or S == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dsink
    dout, q, k, v, out = (_rows(x) for x in (dout, q, k, v, out))
    lse2, delta = (torch.empty((B, H, T), dtype=torch.float32, device=q.device) for _ in range(2))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    sizes = (T, S, H, H // K, geometry.q_offset, geometry.window, geometry.scale, geometry.softcap)
    with _device(q):
        backward_kernels.attention_delta_kernel[(triton.cdiv(T, DELTA_BLOCK) * B * H,)](
            out, dout, lse, None if dlse is None else dlse.float().contiguous(), lse2, delta,
            *out.stride()[:3], *dout.stride()[:3], T, H,
            D=D, BLOCK_D=triton.next_power_of_2(D), BLOCK_M=DELTA_BLOCK, HAS_DLSE=dlse is not None,
        )  # fmt: skip
        tiles = _tiles("dq", q, (k, v))
        backward_kernels.attention_dq_kernel[(triton.cdiv(T, tiles.block_m) * B * H,)](
            q, k, v, dout, *_descriptors((k, v), tiles.block_n, tiles.tma), lse2, delta, dq,
            *intervals(cu_seqlens, T, S, geometry, for_keys=False),
            *strides, *dq.stride()[:3], *sizes, **_shared(geometry, cu_seqlens, D, tiles, q.dtype),
        )  # fmt: skip
        tiles = _tiles("dkv", q, (q, dout))
        backward_kernels.attention_dkv_kernel[(triton.cdiv(S, tiles.block_n) * B * K,)](
            q, k, v, dout, *_descriptors((q, dout), tiles.block_m, tiles.tma), lse2, delta, dk, dv,
            *intervals(cu_seqlens, T, S, geometry, for_keys=True),
            *strides, *dk.stride()[:3], *sizes, **_shared(geometry, cu_seqlens, D, tiles, q.dtype),
        )  # fmt: skip
    if sink is not None:
        dsink = sink_gradient(lse, delta, sink).to(sink.dtype)
    return dq, dk, dv, dsink


def intervals(
    cu_seqlens: Tensor | None, T: int, S: int, geometry: Geometry, *, for_keys: bool
) -> tuple[Tensor | None, Tensor | None]:
    """int32 [B, S] of queries per key or [B, T] of keys per query; None without documents (known in closed form)."""
    if cu_seqlens is None:
        return None, None
    rows, limit = (S, T) if for_keys else (T, S)
    B, entries = cu_seqlens.shape
    low, high = (torch.empty((B, rows), dtype=torch.int32, device=cu_seqlens.device) for _ in range(2))
    document_intervals_kernel[(triton.cdiv(rows, INTERVAL_BLOCK), B)](
        cu_seqlens, low, high, cu_seqlens.stride(0), rows, limit, geometry.q_offset, geometry.window, entries,
        STEPS=entries.bit_length(), CAUSAL=geometry.causal, WINDOWED=geometry.window > 0, FOR_KEYS=for_keys,
        BLOCK=INTERVAL_BLOCK,
    )  # fmt: skip
    return low, high


def _tiles(kernel: str, q: Tensor, streamed: tuple[Tensor, Tensor]) -> tuning.Tiles:
    bits = 32 if q.dtype == torch.float32 else 16
    arch = tuning.architecture(q.device.type, q.device.index)
    tiles = tuning.lookup(kernel, arch, bits, max(16, triton.next_power_of_2(q.shape[3])))
    return tiles._replace(tma=tiles.tma and all(_tma_fits(x) for x in streamed))


def _shared(geometry: Geometry, cu_seqlens: Tensor | None, D: int, tiles: tuning.Tiles, dtype: torch.dtype) -> dict:
    """Compile-time arguments and launch options that the three main kernels have in common."""
    exact = "ieee" if torch.version.hip else "tf32x3"
    return {
        "D": D, "BLOCK_D": max(16, triton.next_power_of_2(D)), "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "CAUSAL": geometry.causal, "WINDOWED": geometry.window > 0, "DOCUMENTS": cu_seqlens is not None,
        "SOFTCAP": geometry.softcap > 0, "TMA": tiles.tma, "PRECISION": exact if dtype == torch.float32 else "tf32",
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True, **dict(tiles.options),
    }  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """x with a dense last dimension and a row stride that 32-bit offsets inside a tile can hold."""
    return x if x.stride(-1) == 1 and x.stride(1) <= MAX_ROW_STRIDE else x.contiguous()


def _tma_fits(x: Tensor) -> bool:
    """TMA wants 16-byte aligned, non-zero strides; anything else goes through pointers."""
    step = 16 // x.element_size()
    aligned = all(n == 1 or (s > 0 and s % step == 0) for n, s in zip(x.shape[:3], x.stride()[:3]))
    return aligned and x.data_ptr() % 16 == 0


def _descriptors(tensors: tuple[Tensor, Tensor], rows: int, tma: bool) -> list[TensorDescriptor | None]:
    """Descriptors of [B, rows, heads, D] tensors as [B, heads, rows, D], one head's rows per block."""
    if not tma:
        return [None, None]
    found: list[TensorDescriptor | None] = []
    for x in tensors:
        B, N, heads, D = x.shape
        unit = max(16, triton.next_power_of_2(D))  # any aligned stride will do for a dimension of size 1
        strides = [s if n > 1 else unit for n, s in zip(x.shape[:3], x.stride()[:3])]
        order = [strides[0], strides[2], strides[1], 1]
        found.append(TensorDescriptor(x, [B, heads, N, D], order, [1, 1, rows, unit]))
    return found


def _device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def require_interpreter() -> None:
    """Without a GPU the kernels run only under Triton's interpreter."""
    if not INTERPRETED:
        state = os.environ.get("TRITON_INTERPRET", "unset")
        raise ValueError(
            f"attention backend 'triton' got CPU tensors, and TRITON_INTERPRET is {state}: "
            "set TRITON_INTERPRET=1 before the start, or use backend 'torch' or 'auto'"
        )
