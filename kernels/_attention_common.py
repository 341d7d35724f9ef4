"""Device helpers shared by the attention kernels.

Every mask here (causal, documents, sliding window, row length) lets query t see one interval of keys [low(t), high(t)),
and lets key s be seen by one interval of queries; both bounds never decrease along the row. A tile of rows therefore
needs only its first and last interval to know which blocks are empty, which are full and which are cut: full blocks run
in a loop without any mask, cut ones in a second loop, empty ones in none. The bounds come from a small kernel of their
own, so that the others know nothing of causality, documents and windows, and one compiled kernel serves them all.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Start of the running maximum: finite, so that rows which have seen no key yet never compute inf - inf.
LOWEST = tl.constexpr(-1.0e38)


@triton.jit(do_not_specialize=["rows", "limit", "q_offset", "window", "entries"])
def intervals_kernel(
    CU, LOW, HIGH, stride_cu, rows, limit, q_offset, window, entries,
    STEPS: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, FOR_KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write, for each query (or key) of a row, the interval of keys (or queries) that it meets.

    CU: int32 [B, entries] ascending document bounds, or None for one document without bounds; LOW, HIGH: int32
    [B, rows]; limit: length of the other side. A binary search of STEPS finds the document; a row outside all
    documents gets an empty interval.
    """
    tiles = tl.cdiv(rows, BLOCK)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    position = row if FOR_KEYS else row + q_offset
    if CU is None:
        known = row >= 0
        start = tl.minimum(position, q_offset if FOR_KEYS else 0)
        end = tl.maximum(position + 1, limit + q_offset if FOR_KEYS else limit)
    else:
        cu = CU + b * stride_cu
        below = tl.zeros([BLOCK], tl.int32)  # number of bounds known to be <= position
        above = tl.zeros([BLOCK], tl.int32) + entries
        for _ in range(STEPS):
            middle = (below + above) // 2
            bound = tl.load(cu + tl.minimum(middle, entries - 1))
            search = below < above
            below = tl.where(search & (bound <= position), middle + 1, below)
            above = tl.where(search & (bound > position), middle, above)
        known = (below > 0) & (below < entries)
        start = tl.load(cu + tl.maximum(below - 1, 0))
        end = tl.load(cu + tl.minimum(below, entries - 1))
    low = start
    high = end
    if CAUSAL:
        if FOR_KEYS:
            low = tl.maximum(low, position)
        else:
            high = tl.minimum(high, position + 1)
    if WINDOWED:
        if FOR_KEYS or not CAUSAL:
            high = tl.minimum(high, position + window)
        if not FOR_KEYS or not CAUSAL:
            low = tl.maximum(low, position - window + 1)
    # outside all documents: `start` is the last bound passed (or the first one to come), which keeps the order
    low = tl.where(known, low, start)
    high = tl.where(known, high, start)
    if FOR_KEYS:
        low -= q_offset
        high -= q_offset
    low = tl.minimum(tl.maximum(low, 0), limit)
    high = tl.minimum(tl.maximum(high, low), limit)
    tl.store(LOW + b * rows + row, low, mask=row < rows)
    tl.store(HIGH + b * rows + row, high, mask=row < rows)


@triton.jit
def query_tile(T, H, BLOCK_M: tl.constexpr):
    """(first query, head, batch element, batch * head) of this program."""
    tiles = tl.cdiv(T, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles  # under a causal mask the longest rows come first, for balance
    bh = tl.program_id(0) // tiles
    return tile * BLOCK_M, bh % H, (bh // H).to(tl.int64), bh


@triton.jit
def key_tile(S, kv_heads, BLOCK_N: tl.constexpr):
    """(first key, key/value head, batch element, last key) of this program."""
    tiles = tl.cdiv(S, BLOCK_N)
    start = (tl.program_id(0) % tiles) * BLOCK_N
    bh = tl.program_id(0) // tiles
    return start, bh % kv_heads, (bh // kv_heads).to(tl.int64), tl.minimum(start + BLOCK_N, S) - 1


@triton.jit
def tile_bounds(LOW, HIGH, start, last):
    """(low, high) of the first row of a tile and (low, high) of its last one."""
    return tl.load(LOW + start), tl.load(HIGH + start), tl.load(LOW + last), tl.load(HIGH + last)


@triton.jit
def block_plan(low_first, high_first, low_last, high_last, BLOCK: tl.constexpr, CUT: tl.constexpr):
    """Split the interval union of a tile into blocks: returns (full_start, full_stop, cut_left, cut_total).

    Full blocks of BLOCK go from full_start to full_stop. Cut block i, of CUT, starts at `cut_block(i, ...)`.
    """
    full = tl.maximum(high_first - low_last, 0) // BLOCK
    full_start = tl.where(full > 0, low_last, low_first)
    full_stop = full_start + full * BLOCK
    cut_left = (full_start - low_first + CUT - 1) // CUT
    cut_right = (tl.maximum(high_last - full_stop, 0) + CUT - 1) // CUT
    return full_start, full_stop, cut_left, cut_left + cut_right


@triton.jit
def cut_block(i, full_start, full_stop, cut_left, CUT: tl.constexpr):
    """First element of the i-th cut block: those left of the full ones come first, then those on the right."""
    return tl.where(i < cut_left, full_start, full_stop) + (i - cut_left) * CUT


@triton.jit
def load_rows(
    base, start, stride, low, high, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """Rows [start, start + ROWS) of a [*, D] matrix as [ROWS, BLOCK_D]; rows outside [low, high) and padding are 0.

    The row offset is 64-bit, the offset inside the tile 32-bit (the host bounds the stride).
    """
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + d[None, :])
    if MASKED:
        keep = ((start + row >= low) & (start + row < high))[:, None]
        if D < BLOCK_D:
            keep = keep & (d < D)[None, :]
        return tl.load(pointers, mask=keep, other=0.0)
    if D < BLOCK_D:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_block(DESC, row, head, stride_head, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [row, row + ROWS) of one head by TMA descriptor, as [ROWS, BLOCK_D]."""
    if D < BLOCK_D:
        # a dimension of its own for the head: what lies behind its D columns is never read, and comes as 0
        tile = DESC.load([row, head, 0]).reshape([ROWS, BLOCK_D])
    else:
        tile = DESC.load([row, head * stride_head])
    return tile


@triton.jit
def row_pointers(base, start, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers of the tile that load_rows reads, for a loop that advances them."""
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    return base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + d[None, :])


@triton.jit
def load_tile(pointers, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile whose rows all exist; columns beyond D are 0."""
    if D < BLOCK_D:
        return tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(base, start, stride, high, value, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store a [ROWS, BLOCK_D] tile to rows [start, high) of a [*, D] matrix."""
    row = tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + d[None, :])
    keep = (start + row < high)[:, None]
    if D < BLOCK_D:
        keep = keep & (d < D)[None, :]
    tl.store(pointers, value.to(base.dtype.element_ty), mask=keep)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """a @ b, added to acc if there is one. PRECISION: as tl.dot takes it for fp32, or "fp64" to sum in that."""
    if PRECISION == "fp64":
        wide = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
        return wide.to(tl.float32) if acc is None else (acc + wide).to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, in the type of x. The quotient cancels near 0: fp32 keeps as many digits as 16 bit need."""
    return 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2E)))


@triton.jit
def exact_cap(scores, scale, softcap):
    """(capped scores, their share of the cap), right to the last digit of fp32: between the products and the result
    nothing is rounded."""
    share = tanh(scores.to(tl.float64) * scale / softcap)
    return (share * softcap).to(tl.float32), share.to(tl.float32)
