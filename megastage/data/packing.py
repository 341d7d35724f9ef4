"""The order of a source of documents: blocks of permuted documents, packed into rows with next to no padding.

Each epoch permutes the documents and packs them block by block for the stage's length (best-fit decreasing; documents
longer than a row are cut), and shuffles the rows of a block. A stage change takes the unread rows of the open block
apart, joins the pieces of a document that touch, and packs them for the new length first: no token is lost.

A stage may have a rule on the length of documents. It is applied within each block, so that a position stays one
number: too short documents are left out, long and short ones are packed apart, and of the kind that there is too much
of rows are left out. What was left out of the open block is given back at a stage change too; that of the blocks before
is not read again in this epoch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megastage.data.block_rows import Packed, Pieces, pack, pack_by, take_apart
from megastage.data.doc_rule import DocRule, Survey
from megastage.data.order import Mark, Order, Recent, Rows, Visit, check_seq_len, ragged_index, runs, saved
from megastage.data.permutation import Permutation, derive_key

BLOCK_DOCUMENTS = 4096
LONG_BLOCK_DOCUMENTS = 16_384  # for rows of LONG tokens and more, which need more documents to fill well
LONG = 32_768
MAX_BLOCK_TOKENS = 1 << 27  # on average; keeps the pieces of a block of very long documents in memory
MAX_GROWTH = 16  # by this a block grows where a rule passes few documents, so that those fill rows well too
_SAMPLED_BLOCKS = 4  # that a forecast of a rule packs
_EMPTY_EPOCHS = 16  # without a row: there will be none
_TURN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: multiples of it spread evenly


@dataclass(frozen=True)
class _Frontier:
    """Where reading stopped: the blocks up to and with `block` (counted over all epochs) but for the pieces `left`."""

    block: int
    left: Pieces


def choose_block(lengths: Sequence[int], n_documents: int, n_tokens: int, passing: int | None = None) -> int:
    """Documents per block for rows of these lengths: more for long rows, fewer when the documents are huge.

    passing: documents of the scarcest kind that some rule needs; a block grows where they are few.
    """
    documents = LONG_BLOCK_DOCUMENTS if max(lengths) >= LONG else BLOCK_DOCUMENTS
    if passing is not None:
        documents = min(MAX_GROWTH * documents, documents * n_documents // max(1, passing))
    mean = max(1, n_tokens // max(1, n_documents))
    return max(1, min(documents, MAX_BLOCK_TOKENS // mean))


def _rows_a_token(blocks: Sequence[tuple[np.ndarray, np.ndarray]], low: int, high: int, seq_len: int) -> float:
    """Rows that the documents of low <= length < high of each block (starts, lengths) make, by their tokens."""
    rows = tokens = 0
    for starts, lengths in blocks:
        pieces = Pieces(np.arange(starts.size), starts, lengths).at((lengths >= low) & (lengths < high))
        rows += pack(pieces, seq_len, 0).n_rows
        tokens += int(pieces.lengths.sum())
    return rows / tokens if tokens else 1 / seq_len


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
        self._surveys: dict[DocRule, Survey] = {}
        self._forecasts: dict[tuple[int, DocRule | None], tuple[float, float]] = {}

    @classmethod
    def make(
        cls,
        doc_ends: np.ndarray,
        lengths: Sequence[int],
        seed: int,
        fingerprint: bytes,
        settings: Mapping[str, Any] | None = None,
        name: str = "source",
        rules: Sequence[DocRule] = (),
    ) -> PackedOrder:
        """With a block size for these lengths and rules, or that of saved `settings`."""
        n_documents = int(doc_ends.size)
        n_tokens = int(doc_ends[-1]) if n_documents else 0
        surveys: dict[DocRule, Survey] = {}
        if settings is None:
            surveys = {rule: Survey.make(doc_ends, rule) for rule in set(rules)}
            passing = min((survey.fewest(rule) for rule, survey in surveys.items()), default=None)
            block = choose_block(lengths, n_documents, n_tokens, passing)
        else:
            saved(name, settings, "packed", n_documents=n_documents, n_tokens=n_tokens, seed=seed)
            block = settings["block_documents"]
        order = cls(doc_ends, block_documents=block, seed=seed, fingerprint=fingerprint, name=name)
        order._surveys = surveys  # each has read all ends once
        return order

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "packed",
            "n_documents": self.n_documents,
            "n_tokens": self.n_tokens,
            "seed": self.seed,
            "block_documents": self.block_documents,
        }

    def enter(
        self, history: Sequence[Visit], seq_len: int, mark: Sequence[int] | None = None, rule: DocRule | None = None
    ) -> PackedCursor:
        """See `Order.enter`; rule: of the stage. Visits without a mark are found by packing all blocks before them."""
        front: _Frontier | None = None
        before, current = runs(history, seq_len, rule)
        # what lies before a mark has no part in what follows it
        first = max((i for i, visit in enumerate(before) if visit.mark is not None), default=0)
        for visit in before[first:]:
            front = PackedCursor(self, front, visit).frontier(visit.rows)
        return PackedCursor(self, front, current._replace(mark=mark or current.mark), current.rows)

    def planned_epochs(self, history: Sequence[Visit]) -> float:
        """See `Order.planned_epochs`. By a forecast of the rows of an epoch."""
        return sum(v.rows / self._forecast(v.seq_len, v.rule)[0] for v in history if v.rows)

    def padding(self, seq_len: int, rule: DocRule | None = None) -> float:
        """About which share of the rows' positions stays empty, as nothing that is left fits there."""
        rows, tokens = self._forecast(seq_len, rule)
        return max(0.0, 1 - tokens / (rows * seq_len))

    def skipped_tokens(self, seq_len: int, rule: DocRule) -> int:
        """Tokens that an epoch leaves out under the rule: a forecast where rows follow a share, else exact."""
        if rule.long_doc_share is None:
            return self.n_tokens - self.survey(rule).short_tokens
        return round(self.n_tokens - self._forecast(seq_len, rule)[1])

    def survey(self, rule: DocRule) -> Survey:
        if rule not in self._surveys:
            self._surveys[rule] = Survey.make(self.doc_ends, rule)
        return self._surveys[rule]

    def _forecast(self, seq_len: int, rule: DocRule | None) -> tuple[float, float]:
        """(rows, tokens) of an epoch, from all documents' lengths and how well the first blocks pack."""
        if (seq_len, rule) not in self._forecasts:
            if rule is None:
                rate = _rows_a_token([self._documents(0)], 1, self.n_tokens + 1, seq_len)
                self._forecasts[seq_len, rule] = self.n_tokens * rate, float(self.n_tokens)
            else:
                self._forecasts[seq_len, rule] = self._forecast_by(rule, seq_len)
        return self._forecasts[seq_len, rule]

    def _forecast_by(self, rule: DocRule, seq_len: int) -> tuple[float, float]:
        """The long tokens fill long_tokens * (rows / tokens of the long documents of some blocks) rows, R_long, the
        short ones R_short; of the share s an epoch then has min(R_long / s, R_short / (1 - s)) rows."""
        blocks = [self._documents(number) for number in range(min(_SAMPLED_BLOCKS, self.n_blocks))]
        split = rule.long_doc_len if rule.long_doc_share is not None else self.n_tokens + 1
        bounds = ((split, self.n_tokens + 1), (max(1, rule.min_doc_len), split))
        rates = [_rows_a_token(blocks, low, high, seq_len) for low, high in bounds]
        found, share = self.survey(rule), rule.long_doc_share or 0.0
        parts = [
            (tokens, rate, part)
            for tokens, rate, part in zip((found.long_tokens, found.short_tokens), rates, (share, 1 - share))
            if part
        ]
        rows = min(tokens * rate / part for tokens, rate, part in parts)
        return rows, sum(rows * part / rate for _, rate, part in parts)

    def block(self, number: int, seq_len: int, rule: DocRule | None = None) -> Packed:
        """The rows of a whole block, counted over all epochs."""
        return self._blocks.get((number, seq_len, rule), lambda: self._make_block(number, seq_len, rule))

    def _make_block(self, number: int, seq_len: int, rule: DocRule | None = None) -> Packed:
        starts, lengths = self._documents(number)
        pieces = Pieces(np.arange(starts.size), starts, lengths)
        return self._pack(number, f"rows of block {number % self.n_blocks}", pieces, seq_len, rule, lengths)

    def pack_left(self, front: _Frontier, seq_len: int, rule: DocRule | None = None) -> Packed:
        """What a stage change left of a block, as rows of the new length. The rule is on whole documents."""
        lengths = None if rule is None else self._documents(front.block)[1]
        what = f"rest of block {front.block % self.n_blocks}"
        return self._pack(front.block, what, front.left, seq_len, rule, lengths)

    def _documents(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """First tokens and lengths of a block's documents in their permuted order: int64[n] each."""
        epoch, block = divmod(number, self.n_blocks)
        order_key = derive_key(self.seed, self.fingerprint, epoch, "documents")
        permutation = self._epochs.get(epoch, lambda: Permutation(self.n_documents, order_key))
        first, stop = (b * self.n_documents // self.n_blocks for b in (block, block + 1))
        documents = permutation(np.arange(first, stop))
        starts = np.where(documents > 0, self.doc_ends[documents - 1].astype(np.int64), 0)
        return starts, self.doc_ends[documents].astype(np.int64) - starts

    def _pack(
        self, number: int, what: str, pieces: Pieces, seq_len: int, rule: DocRule | None, lengths: np.ndarray | None
    ) -> Packed:
        def key(purpose: str) -> int:
            return derive_key(self.seed, self.fingerprint, number // self.n_blocks, purpose)

        if rule is None:
            return pack(pieces, seq_len, key(what))
        assert lengths is not None
        # by the block's number alone: what was read before has no part in it
        turn = (derive_key(self.seed, self.fingerprint, 0, what.split()[0] + " turn") + number * _TURN) % (1 << 64)
        return pack_by(rule, pieces, lengths, seq_len, [key(f"long {what}"), key(f"short {what}"), key(what), turn])


class PackedCursor:
    """A stage's rows: first what was left of the open block, then whole blocks, epoch after epoch.

    How many rows a block makes is known once it is packed, so reading on is cheap, and a jump packs what lies between.
    A mark (block, rows before it) lets a run go on without that. consumed: rows of this length that earlier stages have
    read from here; inside, rows are counted with them.
    """

    skipped_tokens = 0

    def __init__(self, order: PackedOrder, front: _Frontier | None, visit: Visit, consumed: int = 0) -> None:
        """visit: how the stage cuts and chooses its rows, and its mark; how many it consumed does not count here."""
        self._order, self._front, self._consumed, self._rule = order, front, consumed, visit.rule
        self._length, mark = check_seq_len(order.name, visit.seq_len), visit.mark
        self._rest = None if front is None else order.pack_left(front, visit.seq_len, visit.rule)
        self._start = (0 if front is None else front.block + 1, 0 if self._rest is None else self._rest.n_rows)
        block, row = self._start if mark is None else mark
        if block < self._start[0] or row < self._start[1]:
            raise ValueError(f"{order.name}: the saved place {mark} lies before the stage's start {self._start}")
        self._block = block  # the first block of the table
        self._ends = [row]  # by block from there: the stage's rows before it, and after the last one known

    def _find(self, counter: int) -> tuple[Packed, int, int]:
        """The packed block that holds a row, its first row's counter, and its number (-1: the rest of the open one)."""
        if self._rest is not None and counter < self._rest.n_rows:
            return self._rest, 0, -1
        if counter < self._ends[0]:  # before a mark: start over
            self._block, self._ends = self._start[0], [self._start[1]]
        while counter >= self._ends[-1]:
            number = self._block + len(self._ends) - 1
            self._ends.append(self._ends[-1] + self._block_rows(number).n_rows)
            self._refuse_empty()
        at = bisect_right(self._ends, counter) - 1
        return self._block_rows(self._block + at), self._ends[at], self._block + at

    def _block_rows(self, number: int) -> Packed:
        return self._order.block(number, self._length, self._rule)

    def _refuse_empty(self) -> None:
        """Raise ValueError rather than look for a row for ever."""
        order, searched = self._order, _EMPTY_EPOCHS * self._order.n_blocks
        if len(self._ends) > searched and self._ends[-1] == self._ends[-1 - searched]:
            raise ValueError(
                f"{order.name}: {self._rule}: no row in {_EMPTY_EPOCHS} epochs, as no block of {order.block_documents} "
                "documents holds long and short ones; choose long_doc_len so that there are more of both"
            )

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
        return blocks / order.n_blocks + order.planned_epochs([Visit(self._length, counter - row, None, self._rule)])

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


def check_rule(rule: DocRule, order: Order, seq_len: int, n_documents: int | None) -> None:
    """Raises ValueError, naming source and key, when no row of this length can be made of the source under the rule.

    n_documents: of the source, None if unknown; what packing keeps together must be one document each.
    """
    if not isinstance(order, PackedOrder):
        raise ValueError(f"{order.name}: {rule}: the source is not read document by document; take these keys out")
    if n_documents not in (None, order.n_documents):
        raise ValueError(
            f"{order.name}: {rule}: its rows hold several documents and are kept whole; take these keys out, or use "
            "data of one document a row"
        )
    problem = order.survey(rule).problem(rule)
    if problem is not None:
        raise ValueError(f"{order.name}: {problem}")
    order.enter([], seq_len, None, rule).rows(np.zeros(1, np.int64))
