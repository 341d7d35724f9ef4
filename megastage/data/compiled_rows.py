"""Rows of a batch in compiled loops, without Python's lock: the twin of the numpy code in `batch`, with equal results.

Legend: B rows, T tokens of a row, P pieces, C document bounds. All arrays are int64 and contiguous unless said.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from megastage.data import compiled

IGNORED = -100  # as the readers' constant; compiled code takes it as a literal
NO_ENDS, PIECE_ENDS, ALL_ENDS = 0, 1, 2  # look for no document ends, for those at a piece's end, for all of them


class RowKernels(NamedTuple):
    """See `_fill`, `_finish` and `_positions`."""

    fill: Callable[..., int]
    finish: Callable[..., np.ndarray]
    positions: Callable[..., None]


@lru_cache(maxsize=1)
def row_kernels() -> RowKernels | None:
    """The compiled loops, or None where numba is missing or switched off. Not yet compiled for any type: see `warm`."""
    loops = [compiled.compile_loop(function, nogil=True) for function in (_fill, _finish, _positions)]
    fill, finish, positions = loops
    if fill is None or finish is None or positions is None:
        return None
    return RowKernels(fill, finish, positions)


def row_kernels_in_use() -> RowKernels | None:
    """The loops if something has asked for them already: what they do once more is no reason to import numba."""
    return row_kernels() if row_kernels.cache_info().currsize else None


def warm(kernels: RowKernels, dtypes: set[np.dtype[Any]]) -> None:
    """Compile (or load from numba's cache) for sources of these token types, all unsigned."""
    none, mark, out, found = np.empty(0, np.int64), np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0, np.int32)
    ends = np.empty(0, np.int64)
    ends.flags.writeable = False
    for dtype in dtypes:
        tokens = np.empty(0, dtype)
        tokens.flags.writeable = False
        kernels.fill(
            tokens, ends, 0, -1, 0, none, mark, none, none, 1, ALL_ENDS, np.uint64(1), out, out, found, mark, none, none
        )
    kernels.finish(mark, none, found, none, none, 1, ALL_ENDS, out, out)
    kernels.positions(np.empty((0, 1), np.int32), 1, out)


def _fill(
    tokens: np.ndarray,
    ends: np.ndarray,
    base: int,
    behind: int,
    number: int,
    source_B: np.ndarray,
    offsets: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    T: int,
    mode: int,
    limit: int,
    tokens_out: np.ndarray,
    labels_out: np.ndarray,
    found: np.ndarray,
    n_found: np.ndarray,
    first_P: np.ndarray,
    count_P: np.ndarray,
) -> int:
    """Copy the pieces that lie in one file of source `number`: tokens, labels, document ends.

    tokens: the file's, unsigned, read-only; ends: its document ends, read-only; base: its first token in the stream;
    behind: the token behind it, or -100. offsets, starts, lengths: the rows. tokens_out, labels_out: [B * T].
    found: int32, document ends inside pieces in row coordinates, from n_found[0] on; first_P, count_P: where those of
    each piece are. A piece's own end counts as one in mode ALL_ENDS; in mode PIECE_ENDS count is 1 where a document
    ends with the piece. Returns -1, or the number of a piece with a token of `limit` or more.
    """
    size = tokens.size
    at_found = n_found[0]
    bad = -1
    for r in range(source_B.size):
        if source_B[r] != number:
            continue
        column = 0
        for p in range(offsets[r], offsets[r + 1]):
            start, length = starts[p] - base, lengths[p]
            if start < 0 or start >= size:
                column += length
                continue
            at = r * T + column
            piece, following = tokens[start : start + length], tokens[start + 1 : start + length]
            out, label = tokens_out[at : at + length], labels_out[at : at + length]
            for i in range(length):
                out[i] = piece[i]
            for i in range(length - 1):  # a quarter of the bytes of `out`, and still in the cache
                label[i] = following[i]
            highest = piece[0]
            for i in range(length):
                highest = max(highest, piece[i])
            top = np.uint64(highest)
            if start + length < size:
                label[length - 1] = tokens[start + length]
                top = max(top, np.uint64(tokens[start + length]))
            else:
                label[length - 1] = behind
            if top >= limit and bad < 0:
                bad = p
            first_P[p] = at_found
            if mode != 0:
                low, high = 0, ends.size  # the first end behind `start`
                sought = start if mode == 2 else start + length - 1
                while low < high:
                    middle = (low + high) >> 1
                    if ends[middle] <= sought:
                        low = middle + 1
                    else:
                        high = middle
                if mode == 1:
                    count_P[p] = np.int64(low < ends.size and ends[low] == start + length)
                else:
                    last = start
                    while low < ends.size and ends[low] <= start + length:
                        if ends[low] != last:  # an empty document repeats an end
                            last = ends[low]
                            label[last - start - 1] = -100
                            found[at_found] = column + last - start
                            at_found += 1
                        low += 1
                    if last != start + length:
                        found[at_found] = column + length
                        at_found += 1
                    count_P[p] = at_found - first_P[p]
            column += length
    n_found[0] = at_found
    return bad


def _finish(
    offsets: np.ndarray,
    lengths: np.ndarray,
    found: np.ndarray,
    first_P: np.ndarray,
    count_P: np.ndarray,
    T: int,
    mode: int,
    tokens_out: np.ndarray,
    labels_out: np.ndarray,
) -> np.ndarray:
    """Fill the padding; returns cu_seqlens, int32[B, C]: 0, the row's document ends, then its valid length.

    In mode PIECE_ENDS, whose rows are one document each, the label of a document's last token is the first token of the
    row's next piece.
    """
    B = offsets.size - 1
    valid_B = np.empty(B, np.int64)
    most = 1
    for r in range(B):
        at = r * T
        count = 0
        for p in range(offsets[r], offsets[r + 1]):
            at += lengths[p]
            count += count_P[p]
            if mode == 1 and count_P[p] == 1:
                labels_out[at - 1] = tokens_out[at] if p + 1 < offsets[r + 1] else -100
        valid_B[r] = at - r * T
        if mode == 2:
            most = max(most, count)
        for i in range(at, (r + 1) * T):
            tokens_out[i] = 0
            labels_out[i] = -100
    C = 2
    while most >= C:  # most + 1 bounds, rounded up to a power of two
        C *= 2
    cu_BC = np.empty((B, C), np.int32)
    for r in range(B):
        cu_BC[r, 0] = 0
        column = 1
        if mode == 2:
            for p in range(offsets[r], offsets[r + 1]):
                for i in range(first_P[p], first_P[p] + count_P[p]):
                    cu_BC[r, column] = found[i]
                    column += 1
        for i in range(column, C):
            cu_BC[r, i] = valid_B[r]
    return cu_BC


def _positions(cu_BC: np.ndarray, T: int, out: np.ndarray) -> None:
    """Fill out [B * T]: each column's distance to the last bound at or before it. cu_BC: int32[B, C]."""
    for r in range(cu_BC.shape[0]):
        for c in range(cu_BC.shape[1]):
            start = cu_BC[r, c]
            stop = cu_BC[r, c + 1] if c + 1 < cu_BC.shape[1] else T
            row = out[r * T + start : r * T + stop]
            for i in range(row.size):
                row[i] = i
