"""One file's share of a token stream: its arrays, slices of them, and the ends of documents inside a range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

_INDEX_HASH_LIMIT = 1 << 25  # document ends; a longer index is hashed by sampled blocks


@dataclass(frozen=True)
class Part:
    """One file's share of the stream. Arrays are views of read-only maps.

    tokens: int[n]; doc_ends: int[d], ends relative to the part, ascending, the last one n (None: unknown);
    loss_mask: bool or uint8[n], 0 where a token is no target; labels: int[n], each input's label, given by the data;
    unit_ends: int[u], what packing keeps together when that is coarser than documents. With `labels` its ends are not
    among `doc_ends`: the label behind them is known. tokens and labels may be [rows, n] (a view of longer rows).
    """

    tokens: np.ndarray
    doc_ends: np.ndarray | None = None
    loss_mask: np.ndarray | None = None
    labels: np.ndarray | None = None
    unit_ends: np.ndarray | None = None


class FlatPart(NamedTuple):
    """A plain part for compiled loops: unsigned tokens and int64 document ends, both read-only and contiguous.

    base: its first token in the stream; behind: the token behind its last one, -100 at the end of the source.
    """

    tokens: np.ndarray
    ends: np.ndarray
    base: int
    behind: int


def slice_part(part: Part, name: str, start: int, stop: int) -> np.ndarray:
    """Tokens, labels or loss mask of a part, [start, stop)."""
    values = getattr(part, name)
    if values is not None and values.ndim == 2:
        # rows of which some columns are left out, never copied as a whole
        width = values.shape[1]
        top = start // width
        return values[top : -(-stop // width)].reshape(-1)[start - top * width : stop - top * width]
    if values is not None:
        return values[start:stop]
    if name == "loss_mask":
        return np.ones(stop - start, np.bool_)
    raise AssertionError(f"a part without {name} beside parts that have them")


def part_ends(part: Part, low: np.ndarray, high: np.ndarray, eos_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Ragged ends within one part; without an index by the end-of-document token, else only the part's end."""
    if part.doc_ends is not None:
        # the needle takes the index's dtype: another one would make numpy convert the whole index
        a = np.searchsorted(part.doc_ends, low.astype(part.doc_ends.dtype), "right")
        b = np.searchsorted(part.doc_ends, high.astype(part.doc_ends.dtype), "right")
        offsets = np.zeros(len(low) + 1, np.int64)
        np.cumsum(b - a, out=offsets[1:])
        indices = np.arange(offsets[-1]) + np.repeat(a - offsets[:-1], b - a)
        return offsets, part.doc_ends[indices].astype(np.int64)
    pieces = []
    for start, stop in zip(low.tolist(), high.tolist()):
        ends = np.empty(0, np.int64)
        if eos_id is not None:
            ends = start + 1 + np.flatnonzero(part.tokens[start:stop] == eos_id)
        if stop == part.tokens.size and (not ends.size or ends[-1] != stop):
            ends = np.append(ends, stop)
        pieces.append(ends)
    offsets = np.zeros(len(low) + 1, np.int64)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
    return offsets, np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def hash_index(digest: Any, ends: np.ndarray, base: int) -> None:
    """Feed document ends, as they are in the whole stream, to a digest."""
    chunk = 1 << 20
    starts = range(0, len(ends), chunk)
    if len(ends) > _INDEX_HASH_LIMIT:
        starts = range(0, len(ends), len(ends) // 32)
    for start in starts:
        digest.update((ends[start : start + chunk].astype("<i8") + base).tobytes())
