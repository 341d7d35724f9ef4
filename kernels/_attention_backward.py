"""Backward attention kernels (FlashAttention-2, Dao 2023), split by output so that no sum needs atomics.

One kernel owns tiles of queries and writes dq; the other owns tiles of keys, loops over all query heads of its
key/value head and writes dk and dv. Each element is summed by one program in one order: the result is deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megastage.kernels._attention_common import (
    LOG2E,
    block_plan,
    cut_block,
    exact_cap,
    key_tile,
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
def attention_delta_kernel(
    OUT, DOUT, LSE, DLSE, TOTAL, LSE2, DELTA, SCALED, LOW, HIGH,
    stride_ob, stride_ot, stride_oh, stride_db, stride_dt, stride_dh, stride_sb, stride_st, stride_sh, stride_bounds,
    T, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr, LONE: tl.constexpr,
):  # fmt: skip
    """Per query: LSE2 = lse in units of log2 and DELTA = sum(out * dout) - dlse, fp32 [B, H, T].

    fp32 inputs: LSE is the largest score instead and TOTAL the sum of exponentials. LSE2 is then that score as it is,
    and DELTA and dout, stored to SCALED, are divided by TOTAL: the main kernels form exp(score - largest), as the
    softmax does. Its exponent is small where the probability is large; that of exp(score - lse) is not, and its
    rounding would be most of the error.
    Queries without keys get LSE2 = +inf, which makes their probabilities 0 in the main kernels.
    LONE: mark queries that see one key, and no sink, by LSE2 = NaN. Their probability is 1 and out * dout cancels, so
    that DELTA is -dlse. The main kernels take them as such where they work in fp32.
    """
    tiles = tl.cdiv(T, BLOCK_M)
    start = (tl.program_id(0) % tiles) * BLOCK_M
    bh = tl.program_id(0) // tiles
    h = (bh % H).to(tl.int64)
    b = (bh // H).to(tl.int64)
    t = start + tl.arange(0, BLOCK_M)
    out = load_rows(OUT + b * stride_ob + h * stride_oh, start, stride_ot, 0, T, BLOCK_M, D, BLOCK_D, True)
    dout = load_rows(DOUT + b * stride_db + h * stride_dh, start, stride_dt, 0, T, BLOCK_M, D, BLOCK_D, True)
    row = bh.to(tl.int64) * T + t
    lse = tl.load(LSE + row, mask=t < T, other=float("-inf"))
    if TOTAL is None:
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        lse2 = lse * LOG2E
    else:
        delta = tl.sum(out.to(tl.float64) * dout.to(tl.float64), 1)
        lse2 = lse
    if HAS_DLSE:
        delta -= tl.load(DLSE + row, mask=t < T, other=0.0)
    empty = lse == float("-inf")
    if LONE:
        low = tl.load(LOW + b * stride_bounds + t, mask=t < T, other=0)
        high = tl.load(HIGH + b * stride_bounds + t, mask=t < T, other=0)
        lone = high - low == 1
        lse2 = tl.where(lone, float("nan"), lse2)
        if HAS_DLSE:
            delta = tl.where(lone, -tl.load(DLSE + row, mask=t < T, other=0.0), delta)
        else:
            delta = tl.where(lone, 0.0, delta)
    if TOTAL is not None:
        total = tl.load(TOTAL + row, mask=t < T, other=1.0)
        delta = (delta / total).to(tl.float32)
        scaled = SCALED + b * stride_sb + h * stride_sh
        store_rows(scaled, start, stride_st, T, dout / total[:, None], BLOCK_M, D, BLOCK_D)
    tl.store(LSE2 + row, tl.where(empty, float("inf"), lse2), mask=t < T)
    tl.store(DELTA + row, tl.where(empty, 0.0, delta), mask=t < T)


@triton.jit
def _lone(lse2):
    """True where the delta kernel marked a query that sees one key."""
    return lse2 != lse2


@triton.jit
def _probability(scores, lse2, scale, softcap, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """(p, t): probabilities from raw products, and the capped score as a share of the cap (used by its derivative)."""
    if SOFTCAP:
        if EXACT:
            capped, t = exact_cap(scores, scale, softcap)
            return tl.where(_lone(lse2), 1.0, tl.math.exp2((capped - lse2) * LOG2E)), t
        t = tanh(scores * (scale / softcap))
        return tl.math.exp2(t * (softcap * LOG2E) - lse2), t
    if EXACT:
        return tl.where(_lone(lse2), 1.0, tl.math.exp2((scores * scale - lse2) * LOG2E)), scores
    return tl.math.exp2(scores * (scale * LOG2E) - lse2), scores


@triton.jit
def _dq_scores(q, dout, k, v, lse2, delta, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Gradient of the scores of one block."""
    scores = product(q, tl.trans(k), None, PRECISION)
    dp = product(dout, tl.trans(v), None, PRECISION)
    p, capped = _probability(scores, lse2[:, None], scale, softcap, SOFTCAP, q.dtype == tl.float32)
    if q.dtype == tl.float32:
        dp = tl.where(_lone(lse2)[:, None], 0.0, dp)
    ds = p * (dp - delta[:, None])
    if SOFTCAP:
        ds = ds * (1.0 - capped * capped)
    return ds


@triton.jit
def _dq_full_blocks(
    dq, q, dout, lse2, delta, K_DESC, V_DESC, k_base, v_base, b, kv_head, full_start, full_stop,
    stride_kb, stride_ks, stride_kh, stride_vs, stride_vh, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the blocks of keys that every query of the tile sees whole: no mask."""
    if TMA:
        first_row = (b * (stride_kb // stride_ks)).to(tl.int32)
        for s in range(first_row + full_start, first_row + full_stop, BLOCK_N):
            k = load_block(K_DESC, s, kv_head, stride_kh, BLOCK_N, D, BLOCK_D)
            v = load_block(V_DESC, s, kv_head, stride_vh, BLOCK_N, D, BLOCK_D)
            ds = _dq_scores(q, dout, k, v, lse2, delta, scale, softcap, SOFTCAP, PRECISION)
            dq = product(ds.to(k.dtype), k, dq, PRECISION)
    else:
        k_pointers = row_pointers(k_base, full_start, stride_ks, BLOCK_N, BLOCK_D)
        v_pointers = row_pointers(v_base, full_start, stride_vs, BLOCK_N, BLOCK_D)
        for _ in range(full_start, full_stop, BLOCK_N):
            k = load_tile(k_pointers, D, BLOCK_D)
            v = load_tile(v_pointers, D, BLOCK_D)
            ds = _dq_scores(q, dout, k, v, lse2, delta, scale, softcap, SOFTCAP, PRECISION)
            dq = product(ds.to(k.dtype), k, dq, PRECISION)
            k_pointers += BLOCK_N * stride_ks
            v_pointers += BLOCK_N * stride_vs
    return dq


@triton.jit
def _dq_cut_blocks(
    dq, q, dout, lse2, delta, k_base, v_base, low, high, low_first, high_last,
    full_start, full_stop, cut_left, cut_total, stride_ks, stride_vs, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the blocks of keys that a bound of some query cuts."""
    cut = tl.arange(0, CUT)
    for i in range(cut_total):
        s = cut_block(i, full_start, full_stop, cut_left, CUT)
        k = load_rows(k_base, s, stride_ks, low_first, high_last, CUT, D, BLOCK_D, True)
        v = load_rows(v_base, s, stride_vs, low_first, high_last, CUT, D, BLOCK_D, True)
        ds = _dq_scores(q, dout, k, v, lse2, delta, scale, softcap, SOFTCAP, PRECISION)
        seen = ((s + cut)[None, :] < high[:, None]) & ((s + cut)[None, :] >= low[:, None])
        ds = tl.where(seen, ds, 0.0)
        dq = product(ds.to(k.dtype), k, dq, PRECISION)
    return dq


@triton.jit(do_not_specialize=["stride_bounds"])
def attention_dq_kernel(
    K_DESC, V_DESC, Q, K, V, DOUT, LSE2, DELTA, DQ, LOW, HIGH,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_db, stride_dt, stride_dh,
    stride_gb, stride_gt, stride_gh,
    stride_bounds, T, S, H, GROUPS, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CUT: tl.constexpr,
    SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes dq of BLOCK_M queries of one head; layouts as in the forward kernel."""
    start, h, b, bh = query_tile(T, H, BLOCK_M)
    kv_head = h // GROUPS
    t = start + tl.arange(0, BLOCK_M)
    last = tl.minimum(start + BLOCK_M, T) - 1
    LOW += b * stride_bounds
    HIGH += b * stride_bounds
    low_first, high_first, low_last, high_last = tile_bounds(LOW, HIGH, start, last)
    full_start, full_stop, cut_left, cut_total = block_plan(low_first, high_first, low_last, high_last, BLOCK_N, CUT)

    h64 = h.to(tl.int64)
    k_base = K + b * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_base = V + b * stride_vb + kv_head.to(tl.int64) * stride_vh
    q = load_rows(Q + b * stride_qb + h64 * stride_qh, start, stride_qt, 0, T, BLOCK_M, D, BLOCK_D, True)
    dout = load_rows(DOUT + b * stride_db + h64 * stride_dh, start, stride_dt, 0, T, BLOCK_M, D, BLOCK_D, True)
    row = bh.to(tl.int64) * T + t
    lse2 = tl.load(LSE2 + row, mask=t < T, other=float("inf"))
    delta = tl.load(DELTA + row, mask=t < T, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq = _dq_full_blocks(
        dq, q, dout, lse2, delta, K_DESC, V_DESC, k_base, v_base, b, kv_head, full_start, full_stop,
        stride_kb, stride_ks, stride_kh, stride_vs, stride_vh, scale, softcap,
        D, BLOCK_D, BLOCK_N, SOFTCAP, TMA, PRECISION,
    )  # fmt: skip
    # the bounds of single rows are needed, and held in registers, only from here on
    low = tl.load(LOW + tl.minimum(t, last))
    high = tl.load(HIGH + tl.minimum(t, last))
    dq = _dq_cut_blocks(
        dq, q, dout, lse2, delta, k_base, v_base, low, high, low_first, high_last,
        full_start, full_stop, cut_left, cut_total, stride_ks, stride_vs, scale, softcap,
        D, BLOCK_D, CUT, SOFTCAP, PRECISION,
    )  # fmt: skip
    base = DQ + b * stride_gb + h64 * stride_gh
    store_rows(base, start, stride_gt, T, dq * scale, BLOCK_M, D, BLOCK_D)


@triton.jit
def _dkv_probability(
    q, k, lse2, seen, scale, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):
    """Scores are computed transposed, [keys, queries], so that they are left operands of both products."""
    scores = product(k, tl.trans(q), None, PRECISION)
    p, capped = _probability(scores, lse2[None, :], scale, softcap, SOFTCAP, q.dtype == tl.float32)
    if MASKED:
        p = tl.where(seen, p, 0.0)
    return p, capped


@triton.jit
def _dkv_add(
    dk, dv, p, capped, q, v, dout, lse2, deltas, inside, seen,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, WITH_DK: tl.constexpr, WITH_DV: tl.constexpr,
):  # fmt: skip
    """Add what a block of queries gives. deltas: where theirs lie, those `inside` for masked blocks, loaded only where
    they are used."""
    if WITH_DK:
        dp = product(v, tl.trans(dout), None, PRECISION)
    if WITH_DV:
        dv = product(p.to(dout.dtype), dout, dv, PRECISION)
    if WITH_DK:
        if MASKED:
            delta = tl.load(deltas, mask=inside, other=0.0)
        else:
            delta = tl.load(deltas)
        if q.dtype == tl.float32:
            dp = tl.where(_lone(lse2)[None, :], 0.0, dp)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds = ds * (1.0 - capped * capped)
        if MASKED:
            ds = tl.where(seen, ds, 0.0)
        dk = product(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def _dkv_full_blocks(
    dk, dv, k, v, Q_DESC, DOUT_DESC, q_base, d_base, lse2_row, delta_row, b, h, full_start, full_stop,
    stride_qb, stride_qt, stride_qh, stride_db, stride_dt, stride_dh, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, WITH_DK: tl.constexpr, WITH_DV: tl.constexpr,
):  # fmt: skip
    """Add the blocks of one head's queries that see every key of the tile: no mask. dout and delta are loaded only
    where they are used, which saves their registers before."""
    m = tl.arange(0, BLOCK_M)
    if TMA:
        q_row = (b * (stride_qb // stride_qt)).to(tl.int32)
        d_row = (b * (stride_db // stride_dt)).to(tl.int32)
        for t in range(full_start, full_stop, BLOCK_M):
            q = load_block(Q_DESC, q_row + t, h, stride_qh, BLOCK_M, D, BLOCK_D)
            lse2 = tl.load(lse2_row + t + m)
            p, capped = _dkv_probability(q, k, lse2, m, scale, softcap, False, SOFTCAP, PRECISION)
            dout = load_block(DOUT_DESC, d_row + t, h, stride_dh, BLOCK_M, D, BLOCK_D)
            dk, dv = _dkv_add(
                dk, dv, p, capped, q, v, dout, lse2, delta_row + t + m, m, m, False,
                SOFTCAP, PRECISION, WITH_DK, WITH_DV,
            )  # fmt: skip
    else:
        q_pointers = row_pointers(q_base, full_start, stride_qt, BLOCK_M, BLOCK_D)
        d_pointers = row_pointers(d_base, full_start, stride_dt, BLOCK_M, BLOCK_D)
        for t in range(full_start, full_stop, BLOCK_M):
            q = load_tile(q_pointers, D, BLOCK_D)
            lse2 = tl.load(lse2_row + t + m)
            p, capped = _dkv_probability(q, k, lse2, m, scale, softcap, False, SOFTCAP, PRECISION)
            dout = load_tile(d_pointers, D, BLOCK_D)
            dk, dv = _dkv_add(
                dk, dv, p, capped, q, v, dout, lse2, delta_row + t + m, m, m, False,
                SOFTCAP, PRECISION, WITH_DK, WITH_DV,
            )  # fmt: skip
            q_pointers += BLOCK_M * stride_qt
            d_pointers += BLOCK_M * stride_dt
    return dk, dv


@triton.jit
def _dkv_cut_blocks(
    dk, dv, k, v, q_base, d_base, lse2_row, delta_row, low, high, low_first, high_last,
    full_start, full_stop, cut_left, cut_total, stride_qt, stride_dt, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    WITH_DK: tl.constexpr, WITH_DV: tl.constexpr,
):  # fmt: skip
    """Add the blocks of one head's queries that a bound of some key cuts."""
    cut = tl.arange(0, CUT)
    for i in range(cut_total):
        t = cut_block(i, full_start, full_stop, cut_left, CUT)
        q = load_rows(q_base, t, stride_qt, low_first, high_last, CUT, D, BLOCK_D, True)
        inside = (t + cut >= low_first) & (t + cut < high_last)
        lse2 = tl.load(lse2_row + t + cut, mask=inside, other=float("inf"))
        seen = ((t + cut)[None, :] < high[:, None]) & ((t + cut)[None, :] >= low[:, None])
        p, capped = _dkv_probability(q, k, lse2, seen, scale, softcap, True, SOFTCAP, PRECISION)
        dout = load_rows(d_base, t, stride_dt, low_first, high_last, CUT, D, BLOCK_D, True)
        dk, dv = _dkv_add(
            dk, dv, p, capped, q, v, dout, lse2, delta_row + t + cut, inside, seen, True,
            SOFTCAP, PRECISION, WITH_DK, WITH_DV,
        )  # fmt: skip
    return dk, dv


# GROUPS = 1 as a constant unrolls the loops over heads, and Triton 3.9 then spills
@triton.jit(do_not_specialize=["stride_bounds", "GROUPS"])
def attention_dkv_kernel(
    Q_DESC, DOUT_DESC, Q, K, V, DOUT, LSE2, DELTA, DK, DV, LOW, HIGH,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_db, stride_dt, stride_dh,
    stride_gb, stride_gs, stride_gh,
    stride_bounds, T, S, H, GROUPS, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CUT: tl.constexpr,
    SOFTCAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, WITH_DK: tl.constexpr, WITH_DV: tl.constexpr,
):  # fmt: skip
    """One program computes dk and dv of BLOCK_N keys of one key/value head, summed over its GROUPS query heads.

    WITH_DK, WITH_DV: what of it. At head dimension 256 both accumulators do not fit beside the operands of wgmma; two
    launches form the scores twice, five products instead of four, and each runs at the full tensor rate.

    LOW, HIGH: int32 [B, S], the interval of queries that see each key.
    """
    start, kv_head, b, last = key_tile(S, H // GROUPS, BLOCK_N)
    LOW += b * stride_bounds
    HIGH += b * stride_bounds
    low_first, high_first, low_last, high_last = tile_bounds(LOW, HIGH, start, last)
    full_start, full_stop, cut_left, cut_total = block_plan(low_first, high_first, low_last, high_last, BLOCK_M, CUT)

    kv64 = kv_head.to(tl.int64)
    q_base = Q + b * stride_qb
    d_base = DOUT + b * stride_db
    k = load_rows(K + b * stride_kb + kv64 * stride_kh, start, stride_ks, 0, S, BLOCK_N, D, BLOCK_D, True)
    v = load_rows(V + b * stride_vb + kv64 * stride_vh, start, stride_vs, 0, S, BLOCK_N, D, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for g in range(GROUPS):
        h = kv_head * GROUPS + g
        row = (b * H + h) * T
        dk, dv = _dkv_full_blocks(
            dk, dv, k, v, Q_DESC, DOUT_DESC, q_base + h.to(tl.int64) * stride_qh, d_base + h.to(tl.int64) * stride_dh,
            LSE2 + row, DELTA + row, b, h, full_start, full_stop,
            stride_qb, stride_qt, stride_qh, stride_db, stride_dt, stride_dh, scale, softcap,
            D, BLOCK_D, BLOCK_M, SOFTCAP, TMA, PRECISION, WITH_DK, WITH_DV,
        )  # fmt: skip
    # the bounds of single rows are needed, and held in registers, only from here on
    s = tl.minimum(start + tl.arange(0, BLOCK_N), last)
    low = tl.load(LOW + s)
    high = tl.load(HIGH + s)
    for g in range(GROUPS):
        h = kv_head * GROUPS + g
        row = (b * H + h) * T
        dk, dv = _dkv_cut_blocks(
            dk, dv, k, v, q_base + h.to(tl.int64) * stride_qh, d_base + h.to(tl.int64) * stride_dh, LSE2 + row,
            DELTA + row, low, high, low_first, high_last, full_start, full_stop, cut_left, cut_total,
            stride_qt, stride_dt, scale, softcap, D, BLOCK_D, CUT, SOFTCAP, PRECISION, WITH_DK, WITH_DV,
        )  # fmt: skip
    offset = b * stride_gb + kv64 * stride_gh
    if WITH_DK:
        store_rows(DK + offset, start, stride_gs, S, dk * scale, BLOCK_N, D, BLOCK_D)
    if WITH_DV:
        store_rows(DV + offset, start, stride_gs, S, dv, BLOCK_N, D, BLOCK_D)
