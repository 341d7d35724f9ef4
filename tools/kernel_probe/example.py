"""A minimal causal attention forward: something with tensor loops for the probe to look at."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _step(q, k_ptr, v_ptr, out, total, peak, start, rows, columns, scale, MASK: tl.constexpr):
    scores = tl.dot(q, tl.load(k_ptr))
    if MASK:
        scores = tl.where(rows[:, None] >= (start + columns)[None, :], scores, float("-inf"))
    top = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.math.exp2(scores * scale - top[:, None])
    shrink = tl.math.exp2(peak - top)
    v = tl.load(v_ptr)
    return tl.dot(weights.to(v.dtype), v, out * shrink[:, None]), total * shrink + tl.sum(weights, 1), top


@triton.jit
def causal_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, scale, head_stride, row_stride, N,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """N must be a multiple of both tile sizes, `scale` holds log2(e)."""
    block = tl.program_id(0)
    base = tl.program_id(1).to(tl.int64) * head_stride
    rows, columns, dims = block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, D)
    q = tl.load(q_ptr + base + rows[:, None] * row_stride + dims[None, :])
    peak, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)
    k = k_ptr + base + columns[None, :] * row_stride + dims[:, None]
    v = v_ptr + base + columns[:, None] * row_stride + dims[None, :]
    for start in range(0, block * ROWS, COLUMNS):
        out, total, peak = _step(q, k, v, out, total, peak, start, rows, columns, scale, False)
        k += COLUMNS * row_stride
        v += COLUMNS * row_stride
    for start in range(block * ROWS, (block + 1) * ROWS, COLUMNS):
        out, total, peak = _step(q, k, v, out, total, peak, start, rows, columns, scale, True)
        k += COLUMNS * row_stride
        v += COLUMNS * row_stride
    out_offsets = base + rows[:, None] * row_stride + dims[None, :]
    tl.store(out_ptr + out_offsets, (out / total[:, None]).to(out_ptr.dtype.element_ty))
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * N + rows, peak + tl.math.log2(total))
