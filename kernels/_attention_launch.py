"""Host side of the attention kernels: layouts, tiles, descriptors and grids."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megastage.kernels import _attention_backward as backward_kernels
from megastage.kernels import _attention_tuning as tuning
from megastage.kernels._attention_common import intervals_kernel
from megastage.kernels._attention_forward import attention_forward_kernel
from megastage.kernels._attention_reference import Geometry

INTERVAL_BLOCK = 256
DELTA_BLOCK = {torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}  # products of fp32 are formed in fp64
# Offsets inside a tile are 32-bit: a row stride may not exceed this.
MAX_ROW_STRIDE = 2**31 // 256 - 1


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, sink: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, T, H, D], lse fp32 [B, H, T], stats).

    stats, of fp32 inputs: each query's largest score and sum of exponentials, fp32 [2, B, H, T], which give backward
    more digits than lse does; else empty.
    """
    B, T, H, D = q.shape
    S = k.shape[1]
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    exact = q.dtype == torch.float32
    stats = lse.new_empty((2, *lse.shape) if exact else 0)
    if q.numel() == 0 or S == 0:
        return out.zero_(), lse.fill_(-torch.inf), stats.fill_(-torch.inf)
    tiles = _tiles("forward", q, geometry)
    shared = _shared(geometry, q, tiles)
    with _device(q):
        q, (k, v) = _readable(q), _streamed(k, v, tiles.tma)
        low, high, stride_bounds = intervals(cu_seqlens, q, S, geometry, for_keys=False)
        attention_forward_kernel[(triton.cdiv(T, tiles.block_m) * B * H,)](
            *_descriptors((k, v), tiles.block_n, tiles.tma), q, k, v, out, lse,
            *(stats if exact else (None, None)), None if sink is None else sink.float().contiguous(), low, high,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            stride_bounds, T, S, H, H // k.shape[2], geometry.scale, geometry.softcap,
            HAS_SINK=sink is not None, **shared,
        )  # fmt: skip
    return out, lse, stats


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, stats: Tensor,
    cu_seqlens: Tensor | None, sink: Tensor | None, geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dsink); dsink is empty without a sink."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dsink = q.new_zeros(0) if sink is None else torch.zeros_like(sink)
    if q.numel() == 0 or S == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), dsink
    dq_tiles = _tiles("dq", q, geometry)
    key_tiles = {kernel: _tiles(kernel, q, geometry) for kernel in _key_kernels(q)}
    lse2, delta = (torch.empty((B, H, T), dtype=torch.float32, device=q.device) for _ in range(2))
    exact = stats.numel() > 0
    shift = stats[0] if exact else lse.contiguous()
    sizes = (T, S, H, H // K, geometry.scale, geometry.softcap)
    with _device(q):
        out, dout = _readable(out), _readable(dout)
        q, scaled = _streamed(q, _room(dout) if exact else dout, any(tiles.tma for tiles in key_tiles.values()))
        k, v = _streamed(k, v, dq_tiles.tma)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *scaled.stride()[:3])
        low, high, stride_bounds = intervals(cu_seqlens, q, S, geometry, for_keys=False)
        backward_kernels.attention_delta_kernel[(triton.cdiv(T, DELTA_BLOCK[q.dtype]) * B * H,)](
            out, dout, shift, None if dlse is None else dlse.float().contiguous(), stats[1] if exact else None,
            lse2, delta, scaled if exact else None, low, high,
            *out.stride()[:3], *dout.stride()[:3], *scaled.stride()[:3], stride_bounds, T, H,
            D=D, BLOCK_D=triton.next_power_of_2(D), BLOCK_M=DELTA_BLOCK[q.dtype], HAS_DLSE=dlse is not None,
            LONE=sink is None and exact, enable_fp_fusion=True,
        )  # fmt: skip
        backward_kernels.attention_dq_kernel[(triton.cdiv(T, dq_tiles.block_m) * B * H,)](
            *_descriptors((k, v), dq_tiles.block_n, dq_tiles.tma), q, k, v, scaled, lse2, delta, dq, low, high,
            *strides, *dq.stride()[:3], stride_bounds, *sizes, **_shared(geometry, q, dq_tiles),
        )  # fmt: skip
        low, high, stride_bounds = intervals(cu_seqlens, q, S, geometry, for_keys=True)
        for kernel, tiles in key_tiles.items():
            backward_kernels.attention_dkv_kernel[(triton.cdiv(S, tiles.block_n) * B * K,)](
                *_descriptors((q, scaled), tiles.block_m, tiles.tma), q, k, v, scaled, lse2, delta, dk, dv, low, high,
                *strides, *dk.stride()[:3], stride_bounds, *sizes, **_shared(geometry, q, tiles),
                WITH_DK=kernel != "dv", WITH_DV=kernel != "dk",
            )  # fmt: skip
    if sink is not None:
        dsink = _sink_gradient(shift.double() if exact else shift, delta, sink).to(sink.dtype)
    return dq, dk, dv, dsink


def _sink_gradient(shift: Tensor, delta: Tensor, sink: Tensor) -> Tensor:
    """Gradient of the sink logits [H]: minus its probability times delta, over all queries that see a key. shift: the
    log-sum-exp, or the largest score where delta is divided by the sum."""
    p = torch.where(shift > -torch.inf, (sink.to(shift.dtype)[:, None] - shift).exp(), 0.0)
    return -(p * delta).sum((0, 2))


def intervals(
    cu_seqlens: Tensor | None, q: Tensor, S: int, geometry: Geometry, *, for_keys: bool
) -> tuple[Tensor, Tensor, int]:
    """(low, high, batch stride): int32 [B, T] keys per query, or [B, S] queries per key; one row without documents."""
    T = q.shape[1]
    rows, limit = (S, T) if for_keys else (T, S)
    B, entries = (1, 0) if cu_seqlens is None else cu_seqlens.shape
    low, high = (torch.empty((B, rows), dtype=torch.int32, device=q.device) for _ in range(2))
    intervals_kernel[(triton.cdiv(rows, INTERVAL_BLOCK) * B,)](
        cu_seqlens, low, high, 0 if cu_seqlens is None else cu_seqlens.stride(0),
        rows, limit, geometry.q_offset, geometry.window, entries,
        STEPS=entries.bit_length(), CAUSAL=geometry.causal, WINDOWED=geometry.window > 0, FOR_KEYS=for_keys,
        BLOCK=INTERVAL_BLOCK, enable_fp_fusion=True,
    )  # fmt: skip
    return low, high, 0 if cu_seqlens is None else rows


def _tiles(kernel: str, q: Tensor, geometry: Geometry) -> tuning.Tiles:
    arch = tuning.architecture(q.device.type, q.device.index)
    D = q.shape[3]
    return tuning.lookup(kernel, arch, q.dtype, padded(D), geometry.softcap > 0, padded(D) > D)


def _key_kernels(q: Tensor) -> tuple[str, ...]:
    arch = tuning.architecture(q.device.type, q.device.index)
    return tuning.key_kernels(arch, q.dtype, padded(q.shape[3]))


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


def _streamed(first: Tensor, second: Tensor, tma: bool) -> tuple[Tensor, Tensor]:
    """The two tensors that a main loop reads, as `_readable`; for TMA with equally many rows per batch element."""
    first, second = _readable(first, tma), _readable(second, tma)
    if tma and first.shape[0] > 1 and first.stride(0) // first.stride(1) != second.stride(0) // second.stride(1):
        first, second = _copy(first), _copy(second)
    return first, second


def _readable(x: Tensor, tma: bool = False) -> Tensor:
    """x if the kernels can read it with wide loads (and `tma`: by descriptor), else a copy with such a layout.

    Triton knows an alignment only in steps of 16 elements: with other strides every load is narrow and no loop is
    pipelined, which costs far more than a copy. Head dimensions that are no multiple of 16 are therefore copied to
    rows with a gap behind each head, and so are expanded or transposed gradients.
    """
    strides = x.stride()
    wide = strides[3] == 1 and all(stride % 16 == 0 for stride in strides[:3]) and x.data_ptr() % 16 == 0
    if wide and strides[1] <= MAX_ROW_STRIDE and (not tma or _is_matrix(x)):
        return x
    return _copy(x)


def _is_matrix(x: Tensor) -> bool:
    """Whether all heads of a token lie in one row, and rows go on evenly from one batch element to the next: a
    descriptor asks for strides that cover the dimension below and are multiples of its stride."""
    B, _, heads, D = x.shape
    batch, row, head, _ = x.stride()
    in_one_row = (heads - 1) * head + D <= row and (heads == 1 or (head >= D and row % head == 0))
    return in_one_row and (B == 1 or batch % row == 0)


def _copy(x: Tensor) -> Tensor:
    return _room(x).copy_(x)


def _room(x: Tensor) -> Tensor:
    """An empty tensor like x that the kernels can read: rows have a gap behind each head up to a multiple of 16."""
    B, N, heads, D = x.shape
    return torch.empty((B, N, heads, 16 * triton.cdiv(D, 16)), dtype=x.dtype, device=x.device)[..., :D]


def _descriptors(tensors: tuple[Tensor, Tensor], rows: int, tma: bool) -> list[TensorDescriptor | None]:
    """Descriptors of [B, N, heads, D] tensors as matrices of rows (b * rows per batch element + n).

    Columns are those of all heads; where tiles are wider than a head, heads are a dimension of their own, so that what
    lies behind one reads as 0.
    """
    if not tma:
        return [None, None]
    found: list[TensorDescriptor | None] = []
    for x in tensors:
        B, N, heads, D = x.shape
        batch, row, head, _ = x.stride()
        height = (B - 1) * (batch // row) + N
        if padded(D) == D:
            found.append(TensorDescriptor(x, [height, (heads - 1) * head + D], [row, 1], [rows, D]))
        else:
            step = head if heads > 1 else row
            found.append(TensorDescriptor(x, [height, heads, D], [row, step, 1], [rows, 1, padded(D)]))
    return found


def _device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
