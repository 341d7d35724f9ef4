"""Forward attention kernel: tiled online softmax (Milakov & Gimelshein 2018, Dao et al. 2022)."""

from __future__ import annotations

import triton
import triton.language as tl

from megastage.kernels._attention_common import (
    LOG2E,
    LOWEST,
    block_plan,
    cut_block,
    exact_cap,
    load_block,
    load_rows,
    load_tile,
    product,
    query_tile,
    row_pointers,
    store_rows,
    tanh,
    tile_bounds,
)


@triton.jit
def _scores(q, k, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """(scores, factor): scores * factor is in units of log2. fp32 scores are final: their factor is log2(e) alone."""
    scores = product(q, tl.trans(k), None, PRECISION)
    if SOFTCAP:
        if q.dtype == tl.float32:
            capped, _ = exact_cap(scores, scale, softcap)
            return capped, LOG2E
        return tanh(scores * (scale / softcap)), softcap * LOG2E
    if q.dtype == tl.float32:
        return scores * scale, LOG2E
    return scores, scale * LOG2E


@triton.jit
def _fold(scores, factor, v, acc, total, top, PRECISION: tl.constexpr):
    """Fold one block of keys into the running softmax.

    `total` is [rows, 8]: the partial sums of every 8th column need no exchange between the threads of a row, which
    each step would otherwise pay for; the caller adds them up at the end. `top` is in units of log2, but for fp32 in
    those of the scores: subtracting first keeps the digits that a factor of log2(e) rounds off large scores, for one
    instruction more.
    """
    if v.dtype == tl.float32:
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.math.exp2((scores - new_top[:, None]) * factor)
        shrink = tl.math.exp2((top - new_top) * factor)
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)
        p = tl.math.exp2(scores * factor - new_top[:, None])
        shrink = tl.math.exp2(top - new_top)
    total = total * shrink[:, None] + tl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 8]), 1)
    acc = acc * shrink[:, None]
    acc = product(p.to(v.dtype), v, acc, PRECISION)
    return acc, total, new_top


@triton.jit
def _full_blocks(
    acc, total, top, q, K_DESC, V_DESC, k_base, v_base, b, kv_head, full_start, full_stop,
    stride_kb, stride_ks, stride_kh, stride_vs, stride_vh, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the blocks that every query of the tile sees whole: no mask."""
    if TMA:
        # one row number for both: the host checks that K and V hold the same number of rows per batch element
        first_row = (b * (stride_kb // stride_ks)).to(tl.int32)
        for s in range(first_row + full_start, first_row + full_stop, BLOCK_N):
            k = load_block(K_DESC, s, kv_head, stride_kh, BLOCK_N, D, BLOCK_D)
            v = load_block(V_DESC, s, kv_head, stride_vh, BLOCK_N, D, BLOCK_D)
            scores, factor = _scores(q, k, scale, softcap, SOFTCAP, PRECISION)
            acc, total, top = _fold(scores, factor, v, acc, total, top, PRECISION)
    else:
        k_pointers = row_pointers(k_base, full_start, stride_ks, BLOCK_N, BLOCK_D)
        v_pointers = row_pointers(v_base, full_start, stride_vs, BLOCK_N, BLOCK_D)
        for _ in range(full_start, full_stop, BLOCK_N):
            k = load_tile(k_pointers, D, BLOCK_D)
            v = load_tile(v_pointers, D, BLOCK_D)
            scores, factor = _scores(q, k, scale, softcap, SOFTCAP, PRECISION)
            acc, total, top = _fold(scores, factor, v, acc, total, top, PRECISION)
            k_pointers += BLOCK_N * stride_ks
            v_pointers += BLOCK_N * stride_vs
    return acc, total, top


@triton.jit
def _cut_blocks(
    acc, total, top, q, k_base, v_base, low, high, low_first, high_last, full_start, full_stop, cut_left, cut_total,
    stride_ks, stride_vs, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the blocks that a bound of some query cuts."""
    cut = tl.arange(0, CUT)
    for i in range(cut_total):
        s = cut_block(i, full_start, full_stop, cut_left, CUT)
        k = load_rows(k_base, s, stride_ks, low_first, high_last, CUT, D, BLOCK_D, True)
        scores, factor = _scores(q, k, scale, softcap, SOFTCAP, PRECISION)
        seen = ((s + cut)[None, :] < high[:, None]) & ((s + cut)[None, :] >= low[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        v = load_rows(v_base, s, stride_vs, low_first, high_last, CUT, D, BLOCK_D, True)
        acc, total, top = _fold(scores, factor, v, acc, total, top, PRECISION)
    return acc, total, top


@triton.jit(do_not_specialize=["stride_bounds"])
def attention_forward_kernel(
    K_DESC, V_DESC, Q, K, V, OUT, LSE, PEAK, TOTAL, SINK, LOW, HIGH,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_ob, stride_ot, stride_oh,
    stride_bounds, T, S, H, GROUPS, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CUT: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_SINK: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_M queries of one head.

    Q, OUT [B, T, H, D]; K, V [B, S, H / GROUPS, D]; LSE fp32 [B, H, T]; SINK fp32 [H]; LOW, HIGH int32 [B, T].
    PEAK, TOTAL: largest score and sum of exponentials of each query, fp32 [B, H, T], for fp32 inputs; else None.
    K_DESC, V_DESC: TMA descriptors of K and V, read only by the loop over full blocks; cut blocks go through pointers,
    whose mask keeps keys outside the tile's interval (another's padding) out of the products.
    """
    start, h, b, bh = query_tile(T, H, BLOCK_M)
    kv_head = h // GROUPS
    t = start + tl.arange(0, BLOCK_M)
    last = tl.minimum(start + BLOCK_M, T) - 1
    LOW += b * stride_bounds
    HIGH += b * stride_bounds
    low_first, high_first, low_last, high_last = tile_bounds(LOW, HIGH, start, last)
    full_start, full_stop, cut_left, cut_total = block_plan(low_first, high_first, low_last, high_last, BLOCK_N, CUT)

    k_base = K + b * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_base = V + b * stride_vb + kv_head.to(tl.int64) * stride_vh
    q = load_rows(Q + b * stride_qb + h.to(tl.int64) * stride_qh, start, stride_qt, 0, T, BLOCK_M, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_SINK:
        unit = 1.0 if q.dtype == tl.float32 else LOG2E
        top = tl.zeros([BLOCK_M], tl.float32) + tl.maximum(tl.load(SINK + h) * unit, LOWEST)
        total = tl.zeros([BLOCK_M, 8], tl.float32) + 0.125
    else:
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M, 8], tl.float32)
    acc, total, top = _full_blocks(
        acc, total, top, q, K_DESC, V_DESC, k_base, v_base, b, kv_head, full_start, full_stop,
        stride_kb, stride_ks, stride_kh, stride_vs, stride_vh, scale, softcap,
        D, BLOCK_D, BLOCK_N, SOFTCAP, TMA, PRECISION,
    )  # fmt: skip
    # the bounds of single rows are needed, and held in registers, only from here on
    low = tl.load(LOW + tl.minimum(t, last))
    high = tl.load(HIGH + tl.minimum(t, last))
    acc, total, top = _cut_blocks(
        acc, total, top, q, k_base, v_base, low, high, low_first, high_last, full_start, full_stop, cut_left, cut_total,
        stride_ks, stride_vs, scale, softcap, D, BLOCK_D, CUT, SOFTCAP, PRECISION,
    )  # fmt: skip
    empty = low >= high
    total = tl.where(empty, 1.0, tl.sum(total, 1))
    out_base = OUT + b * stride_ob + h.to(tl.int64) * stride_oh
    store_rows(out_base, start, stride_ot, T, acc / total[:, None], BLOCK_M, D, BLOCK_D)
    row = bh.to(tl.int64) * T + t
    if PEAK is None:
        lse = (top + tl.math.log2(total)) * (1.0 / LOG2E)
    else:
        lse = top + tl.math.log2(total) * (1.0 / LOG2E)
        tl.store(PEAK + row, tl.where(empty, float("-inf"), top), mask=t < T)
        tl.store(TOTAL + row, total, mask=t < T)
    tl.store(LSE + row, tl.where(empty, float("-inf"), lse), mask=t < T)
