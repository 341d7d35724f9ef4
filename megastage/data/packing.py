"""The order of a source of documents: blocks of permuted documents, packed into rows with next to no padding.

Each epoch permutes the documents and packs them block by block for the stage's length (best-fit decreasing; documents
longer than a row are cut), and shuffles the rows of a block. A stage change takes the unread rows of the open block
apart, joins the pieces of a document that touch, and packs them for the new length first: no token is lost.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megastage.data import compiled
from megastage.data.order import Mark, Recent, Rows, Visit, check_seq_len, ragged_index, runs, saved
from megastage.data.permutation import Permutation, derive_key

BLOCK_DOCUMENTS = 4096
LONG_BLOCK_DOCUMENTS = 16_384  # for rows of LONG tokens and more, which need more documents to fill well
LONG = 32_768
MAX_BLOCK_TOKENS = 1 << 27  # on average; keeps the pieces of a block of very long documents in memory


class Pieces(NamedTuple):
    """Pieces of documents: int64[p] each; `docs` numbers the documents within their block."""

    docs: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class _Packed:
    """The rows of one block, in the order in which they are read: row r is pieces offsets[r]..offsets[r+1]-1."""

    offsets: np.ndarray
    pieces: Pieces

    @property
    def n_rows(self) -> int:
        return self.offsets.size - 1


@dataclass(frozen=True)
class _Frontier:
    """Where reading stopped: the blocks up to and with `block` (counted over all epochs) but for the pieces `left`."""

    block: int
    left: Pieces


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


def pack(pieces: Pieces, seq_len: int, key: int) -> _Packed:
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
    falling = rest[np.argsort(seq_len - lengths[rest], kind="stable")]
    best_fit = compiled.best_fit() or best_fit_plain
    bins = best_fit(lengths[falling], seq_len)
    row[falling] = n_whole + bins
    n_rows = n_whole + (int(bins.max()) + 1 if bins.size else 0)
    if n_rows:
        row = Permutation(n_rows, key)(row)
    order = np.argsort(row, kind="stable")  # within a row the pieces keep the block's random order of documents
    offsets = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=n_rows))))
    return _Packed(offsets, Pieces(pieces.docs[owner][order], starts[order], lengths[order]))


def take_apart(packed: _Packed, read: int) -> Pieces:
    """The pieces of all rows but the first `read`, in the order of documents; those that touch are joined."""
    first = int(packed.offsets[read])
    docs, starts, lengths = (array[first:] for array in packed.pieces)
    order = np.lexsort((starts, docs))
    docs, starts, lengths = docs[order], starts[order], lengths[order]
    if not docs.size:
        return Pieces(docs, starts, lengths)
    touches = (docs[1:] == docs[:-1]) & (starts[1:] == starts[:-1] + lengths[:-1])
    heads = np.flatnonzero(np.concatenate(([True], ~touches)))
    return Pieces(docs[heads], starts[heads], np.add.reduceat(lengths, heads))


def choose_block(lengths: Sequence[int], n_documents: int, n_tokens: int) -> int:
    """Documents per block for rows of these lengths: more for long rows, fewer when the documents are huge."""
    documents = LONG_BLOCK_DOCUMENTS if max(lengths) >= LONG else BLOCK_DOCUMENTS
    mean = max(1, n_tokens // max(1, n_documents))
    return max(1, min(documents, MAX_BLOCK_TOKENS // mean))


class PackedOrder:
    """The sample order of a source of documents.

    doc_ends: int64 or uint64 [n_documents], cumulative ends of the documents in the token stream (a memory map will
    do); empty documents are never read. block_documents: fixed for the whole run.
    """

    def __init__(
        self, doc_ends: np.ndarray, *, block_documents: int, seed: int, fingerprint: bytes, name: str = "source"
    ) -> None:
        self.doc_ends, self.block_documents, self.name = doc_ends, block_documents, name
        self.seed, self.fingerprint = seed, fingerprint
        self.n_documents = int(doc_ends.size)
        self.n_tokens = int(doc_ends[-1]) if self.n_documents else 0
        if self.n_tokens < 1 or block_documents < 1:
            raise ValueError(f"{name}: {self.n_documents} documents with {self.n_tokens} tokens: nothing to read")
        self.n_blocks = -(-self.n_documents // block_documents)
        self._epochs, self._blocks = Recent(2), Recent(4)

    @classmethod
    def make(
        cls,
        doc_ends: np.ndarray,
        lengths: Sequence[int],
        seed: int,
        fingerprint: bytes,
        settings: Mapping[str, Any] | None = None,
        name: str = "source",
    ) -> PackedOrder:
        """With a block size for these lengths, or that of saved `settings`."""
        n_documents = int(doc_ends.size)
        n_tokens = int(doc_ends[-1]) if n_documents else 0
        if settings is None:
            block = choose_block(lengths, n_documents, n_tokens)
        else:
            saved(name, settings, "packed", n_documents=n_documents, n_tokens=n_tokens, seed=seed)
            block = settings["block_documents"]
        return cls(doc_ends, block_documents=block, seed=seed, fingerprint=fingerprint, name=name)

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "packed",
            "n_documents": self.n_documents,
            "n_tokens": self.n_tokens,
            "seed": self.seed,
            "block_documents": self.block_documents,
        }

    def enter(self, history: Sequence[Visit], seq_len: int, mark: Sequence[int] | None = None) -> PackedCursor:
        """See `Order.enter`. Visits without a mark are found by packing all blocks before them."""
        front: _Frontier | None = None
        before, current = runs(history, seq_len)
        # what lies before a mark has no part in what follows it
        first = max((i for i, visit in enumerate(before) if visit.mark is not None), default=0)
        for visit in before[first:]:
            front = PackedCursor(self, front, visit.seq_len, visit.mark).frontier(visit.rows)
        return PackedCursor(self, front, seq_len, mark or current.mark, current.rows)

    def planned_epochs(self, history: Sequence[Visit]) -> float:
        return sum(v.rows * v.seq_len for v in history) / self.n_tokens

    def block(self, number: int, seq_len: int) -> _Packed:
        """The rows of a whole block, counted over all epochs."""
        return self._blocks.get((number, seq_len), lambda: self._make_block(number, seq_len))

    def _make_block(self, number: int, seq_len: int) -> _Packed:
        epoch, block = divmod(number, self.n_blocks)
        order_key = derive_key(self.seed, self.fingerprint, epoch, "documents")
        permutation = self._epochs.get(epoch, lambda: Permutation(self.n_documents, order_key))
        first, stop = (b * self.n_documents // self.n_blocks for b in (block, block + 1))
        documents = permutation(np.arange(first, stop))
        ends = self.doc_ends[documents].astype(np.int64)
        starts = np.where(documents > 0, self.doc_ends[documents - 1].astype(np.int64), 0)
        pieces = Pieces(np.arange(stop - first), starts, ends - starts)
        return pack(pieces, seq_len, derive_key(self.seed, self.fingerprint, epoch, f"rows of block {block}"))

    def pack_left(self, front: _Frontier, seq_len: int) -> _Packed:
        """What a stage change left of a block, as rows of the new length."""
        epoch, block = divmod(front.block, self.n_blocks)
        return pack(front.left, seq_len, derive_key(self.seed, self.fingerprint, epoch, f"rest of block {block}"))


class PackedCursor:
    """A stage's rows: first what was left of the open block, then whole blocks, epoch after epoch.

    How many rows a block makes is known once it is packed, so reading on is cheap, and a jump packs what lies between.
    A mark (block, rows before it) lets a run go on without that. consumed: rows of this length that earlier stages have
    read from here; inside, rows are counted with them.
    """

    skipped_tokens = 0

    def __init__(
        self,
        order: PackedOrder,
        front: _Frontier | None,
        seq_len: int,
        mark: Sequence[int] | None = None,
        consumed: int = 0,
    ) -> None:
        self._order, self._front, self._consumed = order, front, consumed
        self._length = check_seq_len(order.name, seq_len)
        self._rest = None if front is None else order.pack_left(front, seq_len)
        self._start = (0 if front is None else front.block + 1, 0 if self._rest is None else self._rest.n_rows)
        block, row = self._start if mark is None else mark
        if block < self._start[0] or row < self._start[1]:
            raise ValueError(f"{order.name}: the saved place {mark} lies before the stage's start {self._start}")
        self._block = block  # the first block of the table
        self._ends = [row]  # by block from there: the stage's rows before it, and after the last one known

    def _find(self, counter: int) -> tuple[_Packed, int, int]:
        """The packed block that holds a row, its first row's counter, and its number (-1: the rest of the open one)."""
        if self._rest is not None and counter < self._rest.n_rows:
            return self._rest, 0, -1
        if counter < self._ends[0]:  # before a mark: start over
            self._block, self._ends = self._start[0], [self._start[1]]
        while counter >= self._ends[-1]:
            number = self._block + len(self._ends) - 1
            self._ends.append(self._ends[-1] + self._order.block(number, self._length).n_rows)
        at = bisect_right(self._ends, counter) - 1
        return self._order.block(self._block + at, self._length), self._ends[at], self._block + at

    def rows(self, counters: np.ndarray) -> Rows:
        """See `Cursor.rows`."""
        counters = np.asarray(counters, np.int64) + self._consumed
        counts, starts, lengths = [], [], []
        done = 0
        while done < counters.size:
            packed, first, _ = self._find(int(counters[done]))
            stop = done + int(np.searchsorted(counters[done:], first + packed.n_rows))
            row = counters[done:stop] - first
            count = packed.offsets[row + 1] - packed.offsets[row]
            index, _ = ragged_index(packed.offsets[row], count)
            counts.append(count)
            starts.append(packed.pieces.starts[index])
            lengths.append(packed.pieces.lengths[index])
            done = stop
        if not counts:
            return Rows(np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))
        offsets = np.concatenate(([0], np.cumsum(np.concatenate(counts))))
        return Rows(offsets, np.concatenate(starts), np.concatenate(lengths))

    def epoch_at(self, counter: int) -> float:
        """See `Cursor.epoch_at`; beyond the blocks packed so far it takes their rows to be full."""
        order = self._order
        counter += self._consumed
        if self._rest is not None and self._front is not None and counter < self._rest.n_rows:
            unread = int(self._rest.pieces.lengths[int(self._rest.offsets[counter]) :].sum())
            return (self._front.block + 1) / order.n_blocks - unread / order.n_tokens
        at = max(0, bisect_right(self._ends, counter) - 1)
        blocks, row = (self._block + at, self._ends[at]) if counter >= self._ends[0] else self._start
        return blocks / order.n_blocks + (counter - row) * self._length / order.n_tokens

    def mark(self, consumed: int) -> Mark | None:
        """See `Cursor.mark`: the block of the last consumed row, which must have been read."""
        if consumed + self._consumed == 0:
            return None
        _, first, number = self._find(consumed + self._consumed - 1)
        return None if number < 0 else (number, first)

    def frontier(self, rows: int) -> _Frontier | None:
        """Where a stage of another length begins when this one consumed `rows` rows."""
        rows += self._consumed
        if rows == 0:
            return self._front
        packed, first, number = self._find(rows - 1)
        if number < 0:
            assert self._front is not None
            number = self._front.block
        return _Frontier(number, take_apart(packed, rows - first))
