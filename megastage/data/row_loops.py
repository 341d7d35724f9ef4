"""The loops of `compiled_rows`, compiled when first called. This module imports numba: see `compiled_rows.row_kernels`.

Legend: B rows, T tokens of a row, P pieces, C document bounds. All arrays are int64 and contiguous unless said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from megastage.data.compiled import compile_loop


def _loop(function: Callable[..., Any]) -> Any:
    return compile_loop(function, nogil=True)


@_loop
def _copy_piece(tokens: np.ndarray, start: int, behind: int, out: np.ndarray, label: np.ndarray) -> np.uint64:
    """Copy tokens from `start` on, and to `label` the next token of each; returns the highest of all."""
    length = out.size
    piece, following = tokens[start : start + length], tokens[start + 1 : start + length]
    for i in range(length):
        out[i] = piece[i]
    for i in range(length - 1):  # a quarter of the bytes of `out`, and still in the cache
        label[i] = following[i]
    highest = piece[0]
    for i in range(length):
        highest = max(highest, piece[i])
    top = np.uint64(highest)
    if start + length < tokens.size:
        label[length - 1] = tokens[start + length]
        return max(top, np.uint64(tokens[start + length]))
    label[length - 1] = behind
    return top


@_loop
def _first_behind(ends: np.ndarray, sought: int) -> int:
    """The number of the first of the rising `ends` that is larger than `sought`."""
    low, high = 0, ends.size
    while low < high:
        middle = (low + high) >> 1
        if ends[middle] <= sought:
            low = middle + 1
        else:
            high = middle
    return low


@_loop
def _piece_ends(ends: np.ndarray, start: int, column: int, label: np.ndarray, found: np.ndarray, at_found: int) -> int:
    """Note the document ends inside a piece from `at_found` on, in row coordinates, and the piece's own; mask the
    label in front of each but the piece's own where its document goes on. Returns where the next go."""
    stop = start + label.size
    at, last = _first_behind(ends, start), start
    while at < ends.size and ends[at] <= stop:
        if ends[at] != last:  # an empty document repeats an end
            last = ends[at]
            label[last - start - 1] = -100
            found[at_found] = column + last - start
            at_found += 1
        at += 1
    if last != stop:
        found[at_found] = column + label.size
        at_found += 1
    return at_found


@_loop
def fill(
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
            label = labels_out[at : at + length]
            top = _copy_piece(tokens, start, behind, tokens_out[at : at + length], label)
            if top >= limit and bad < 0:
                bad = p
            first_P[p] = at_found
            if mode == 2:
                at_found = _piece_ends(ends, start, column, label, found, at_found)
                count_P[p] = at_found - first_P[p]
            elif mode == 1:
                n = _first_behind(ends, start + length - 1)
                count_P[p] = np.int64(n < ends.size and ends[n] == start + length)
            column += length
    n_found[0] = at_found
    return bad


@_loop
def finish(
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


@_loop
def positions(cu_BC: np.ndarray, T: int, out: np.ndarray) -> None:
    """Fill out [B * T]: each column's distance to the last bound at or before it. cu_BC: int32[B, C]."""
    for r in range(cu_BC.shape[0]):
        for c in range(cu_BC.shape[1]):
            start = cu_BC[r, c]
            stop = cu_BC[r, c + 1] if c + 1 < cu_BC.shape[1] else T
            row = out[r * T + start : r * T + stop]
            for i in range(row.size):
                row[i] = i
