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
from megastage.kernels._attention_common import intervals_kernel
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
    tiles = _tiles("forward", q, (k, v), geometry.softcap > 0)
    shared = _shared(geometry, q, tiles)
    with _device(q):
        low, high, stride_bounds = intervals(cu_seqlens, q, S, geometry, for_keys=False)
        attention_forward_kernel[(triton.cdiv(T, tiles.block_m) * B * H,)](
            *_descriptors((k, v), tiles.block_n, tiles.tma), q, k, v, out, lse,
            None if sink is None else sink.float().contiguous(), low, high,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            stride_bounds, T, S, H, H // k.shape[2], geometry.scale, geometry.softcap,
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
    sizes = (T, S, H, H // K, geometry.scale, geometry.softcap)
    with _device(q):
        low, high, stride_bounds = intervals(cu_seqlens, q, S, geometry, for_keys=False)
        backward_kernels.attention_delta_kernel[(triton.cdiv(T, DELTA_BLOCK) * B * H,)](
            out, dout, lse, None if dlse is None else dlse.float().contiguous(), lse2, delta, low, high,
            *out.stride()[:3], *dout.stride()[:3], stride_bounds, T, H,
            D=D, BLOCK_D=triton.next_power_of_2(D), BLOCK_M=DELTA_BLOCK, HAS_DLSE=dlse is not None,
            LONE=sink is None and q.dtype == torch.float32,
        )  # fmt: skip
        tiles = _tiles("dq", q, (k, v), geometry.softcap > 0)
        backward_kernels.attention_dq_kernel[(triton.cdiv(T, tiles.block_m) * B * H,)](
            *_descriptors((k, v), tiles.block_n, tiles.tma), q, k, v, dout, lse2, delta, dq, low, high,
            *strides, *dq.stride()[:3], stride_bounds, *sizes, **_shared(geometry, q, tiles),
        )  # fmt: skip
        tiles = _tiles("dkv", q, (q, dout), geometry.softcap > 0)
        low, high, stride_bounds = intervals(cu_seqlens, q, S, geometry, for_keys=True)
        backward_kernels.attention_dkv_kernel[(triton.cdiv(S, tiles.block_n) * B * K,)](
            *_descriptors((q, dout), tiles.block_m, tiles.tma), q, k, v, dout, lse2, delta, dk, dv, low, high,
            *strides, *dk.stride()[:3], stride_bounds, *sizes, **_shared(geometry, q, tiles),
        )  # fmt: skip
    if sink is not None:
        dsink = sink_gradient(lse, delta, sink).to(sink.dtype)
    return dq, dk, dv, dsink


def intervals(
    cu_seqlens: Tensor | None, q: Tensor, S: int, geometry: Geometry, *, for_keys: bool
) -> tuple[Tensor, Tensor, int]:
    """(low, high, batch stride): int32 [B, T] keys per query, or [B, S] queries per key; one row without documents."""
    T = q.shape[1]
    rows, limit = (S, T) if for_keys else (T, S)
    B, entries = (1, 0) if cu_seqlens is None else cu_seqlens.shape
    low, high = (torch.empty((B, rows), dtype=torch.int32, device=q.device) for _ in range(2))
    intervals_kernel[(triton.cdiv(rows, INTERVAL_BLOCK), B)](
        cu_seqlens, low, high, 0 if cu_seqlens is None else cu_seqlens.stride(0),
        rows, limit, geometry.q_offset, geometry.window, entries,
        STEPS=entries.bit_length(), CAUSAL=geometry.causal, WINDOWED=geometry.window > 0, FOR_KEYS=for_keys,
        BLOCK=INTERVAL_BLOCK,
    )  # fmt: skip
    return low, high, 0 if cu_seqlens is None else rows


def _tiles(kernel: str, q: Tensor, streamed: tuple[Tensor, Tensor], softcap: bool) -> tuning.Tiles:
    bits = 32 if q.dtype == torch.float32 else 16
    arch = tuning.architecture(q.device.type, q.device.index)
    D = q.shape[3]
    tiles = tuning.lookup(kernel, arch, bits, padded(D), softcap, padded(D) > D)
    one, two = (_rows_per_batch(x) for x in streamed)
    fits = one is not None and (one == two or (two is not None and kernel == "dkv"))
    return tiles._replace(tma=tiles.tma and fits)


def padded(D: int) -> int:
    """Width of the tiles for head dimension D."""
    return max(16, triton.next_power_of_2(D))


def _shared(geometry: Geometry, q: Tensor, tiles: tuning.Tiles) -> dict:
    """Compile-time arguments and launch options that the three main kernels have in common."""
    D = q.shape[3]
    precision = tuning.precision(tuning.architecture(q.device.type, q.device.index), q.dtype == torch.float32)
    return {
        "D": D, "BLOCK_D": padded(D), "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "CUT": tiles.cut,
        "SOFTCAP": geometry.softcap > 0, "TMA": tiles.tma, "PRECISION": precision,
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True, **dict(tiles.options),
    }  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """x with a dense last dimension and a row stride that 32-bit offsets inside a tile can hold."""
    return x if x.stride(-1) == 1 and x.stride(1) <= MAX_ROW_STRIDE else x.contiguous()


def _rows_per_batch(x: Tensor) -> int | None:
    """Rows from one batch element to the next if TMA can read x as a matrix of rows, else None.

    That takes 16-byte aligned rows that go on evenly from one batch element to the next.
    """
    rows, step = x.stride(1), 16 // x.element_size()
    if rows <= 0 or rows % step or x.stride(0) % rows or x.data_ptr() % 16:
        return None
    return x.stride(0) // rows


def _descriptors(tensors: tuple[Tensor, Tensor], rows: int, tma: bool) -> list[TensorDescriptor | None]:
    """Descriptors of [B, N, heads, D] tensors as matrices: row b * rows_per_batch + n, column head * its stride."""
    if not tma:
        return [None, None]
    found: list[TensorDescriptor | None] = []
    for x in tensors:
        B, N, heads, D = x.shape
        shape = [(B - 1) * (x.stride(0) // x.stride(1)) + N, (heads - 1) * x.stride(2) + D]
        found.append(TensorDescriptor(x, shape, [x.stride(1), 1], [rows, padded(D)]))
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
