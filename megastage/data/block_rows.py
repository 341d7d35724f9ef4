"""The documents of one block as rows: best-fit decreasing, and back again."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megastage.data import compiled
from megastage.data.doc_rule import DocRule
from megastage.data.order import ragged_index
from megastage.data.permutation import Permutation


class Pieces(NamedTuple):
    """Pieces of documents: int64[p] each; `docs` numbers the documents within their block."""

    docs: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def at(self, which: Any) -> Pieces:
        """The pieces that an index or a mask selects."""
        return Pieces(self.docs[which], self.starts[which], self.lengths[which])

    @staticmethod
    def join(*parts: Pieces) -> Pieces:
        """All pieces of several."""
        return Pieces(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


NO_PIECES = Pieces(*(np.empty(0, np.int64) for _ in range(3)))


@dataclass(frozen=True)
class Packed:
    """The rows of one block, in the order in which they are read: row r is pieces offsets[r]..offsets[r+1]-1.

    left_out: what a rule keeps from being read.
    """

    offsets: np.ndarray
    pieces: Pieces
    left_out: Pieces = NO_PIECES

    @property
    def n_rows(self) -> int:
        return self.offsets.size - 1


def best_fit_plain(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Bins of items given in falling order of length: int64[n]. Each goes to the fullest bin that still holds it.

    Among equally full bins the one filled last is taken. The twin of `compiled.best_fit()`.
    """
    bins = []
    rooms: list[int] = []  # the free rooms that some bin has, rising
    by_room: dict[int, list[int]] = {}
    opened = 0
    for length in lengths.tolist():
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, target = capacity, opened
            opened += 1
        else:
            room = rooms[at]
            target = by_room[room].pop()
            if not by_room[room]:
                del rooms[at], by_room[room]
        bins.append(target)
        room -= length
        if room in by_room:
            by_room[room].append(target)
        else:
            by_room[room] = [target]
            insort(rooms, room)
    return np.array(bins, np.int64)


def _stable_order(values: np.ndarray, limit: int) -> np.ndarray:
    """A stable argsort of values below `limit`: of 16 bits numpy sorts by radix, in a fifth of the time."""
    return np.argsort(values.astype(np.uint16) if limit <= 1 << 16 else values, kind="stable")


def pack(pieces: Pieces, seq_len: int, key: int) -> Packed:
    """Rows of at most `seq_len` tokens that hold every token of `pieces` once, shuffled by `key`."""
    count = -(-pieces.lengths // seq_len)
    part, owner = ragged_index(np.zeros(count.size, np.int64), count)
    starts = pieces.starts[owner] + part * seq_len
    lengths = np.minimum(seq_len, pieces.lengths[owner] - part * seq_len)
    row = np.empty(lengths.size, np.int64)
    whole = lengths == seq_len
    n_whole = int(whole.sum())
    row[whole] = np.arange(n_whole)
    rest = np.flatnonzero(~whole)
    falling = rest[_stable_order(seq_len - lengths[rest], seq_len)]
    best_fit = compiled.best_fit() or best_fit_plain
    bins = best_fit(lengths[falling], seq_len)
    row[falling] = n_whole + bins
    n_rows = n_whole + (int(bins.max()) + 1 if bins.size else 0)
    if n_rows:
        row = Permutation(n_rows, key)(row)
    order = _stable_order(row, n_rows)  # within a row the pieces keep the block's random order of documents
    offsets = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=n_rows))))
    return Packed(offsets, Pieces(pieces.docs[owner][order], starts[order], lengths[order]))


def pack_by(rule: DocRule, pieces: Pieces, doc_lengths: np.ndarray, seq_len: int, keys: Sequence[int]) -> Packed:
    """As `pack`, of the documents and in the shares that the rule names. doc_lengths: int64, by number in the block.

    keys: four, to shuffle long rows, short rows and both together, and the turn by which a row's fraction is rounded.
    """
    length = doc_lengths[pieces.docs]
    passes, long = length >= rule.min_doc_len, length >= rule.long_doc_len
    too_short = pieces.at(~passes)
    if rule.long_doc_share is None:
        packed = pack(pieces.at(passes), seq_len, keys[2])
        return Packed(packed.offsets, packed.pieces, too_short)
    kinds = [pack(pieces.at(passes & kind), seq_len, key) for kind, key in ((long, keys[0]), (~long, keys[1]))]
    kept = rule.rows_kept(kinds[0].n_rows, kinds[1].n_rows, keys[3])
    ends = [int(kind.offsets[n]) for kind, n in zip(kinds, kept)]
    left_out = Pieces.join(too_short, *(kind.pieces.at(slice(end, None)) for kind, end in zip(kinds, ends)))
    both = Pieces.join(*(kind.pieces.at(slice(end)) for kind, end in zip(kinds, ends)))
    count = np.concatenate([np.diff(kind.offsets[: n + 1]) for kind, n in zip(kinds, kept)])
    if not count.size:
        return Packed(np.zeros(1, np.int64), NO_PIECES, left_out)
    order = Permutation(count.size, keys[2])(np.arange(count.size))
    index, _ = ragged_index((np.cumsum(count) - count)[order], count[order])
    return Packed(np.concatenate(([0], np.cumsum(count[order]))), both.at(index), left_out)


def _order_of_pieces(docs: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """By document and place, no two of which are equal; in one number where they fit, for a fourth of the time."""
    if docs.size and docs.max() < 1 << 18 and starts.max() < 1 << 44:
        return np.argsort(docs << 44 | starts)
    return np.lexsort((starts, docs))


def take_apart(packed: Packed, read: int) -> Pieces:
    """The pieces of all rows but the first `read`, and what was left out, in the order of documents; those that touch
    are joined."""
    unread = packed.pieces.at(slice(int(packed.offsets[read]), None))
    docs, starts, lengths = Pieces.join(unread, packed.left_out)
    order = _order_of_pieces(docs, starts)
    docs, starts, lengths = docs[order], starts[order], lengths[order]
    if not docs.size:
        return Pieces(docs, starts, lengths)
    touches = (docs[1:] == docs[:-1]) & (starts[1:] == starts[:-1] + lengths[:-1])
    heads = np.flatnonzero(np.concatenate(([True], ~touches)))
    return Pieces(docs[heads], starts[heads], np.add.reduceat(lengths, heads))
