"""Which rows make up a global batch, computed from integers alone: the same on every rank, no token is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megastage.data.doc_rule import rule_of
from megastage.data.index import DataIndex
from megastage.data.order import Cursor, Rows, Visit, ragged_index
from megastage.data.packing import PackedOrder
from megastage.data.state import StageRecord, histories


@dataclass(frozen=True)
class Plan:
    """The global batch of samples [start, start + n): source int64[n] of each row, its pieces, and their digest.

    marks: by order key, where the rows of each source that was drawn end (see `Visit.mark`).
    """

    start: int
    source: np.ndarray
    rows: Rows
    digest: str
    marks: Mapping[str, list[int]]

    def part(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray, Rows]:
        """(sources, sample ids, pieces) of rows low .. high-1 of the batch."""
        first, stop = int(self.rows.offsets[low]), int(self.rows.offsets[high])
        rows = Rows(
            self.rows.offsets[low : high + 1] - first, self.rows.starts[first:stop], self.rows.lengths[first:stop]
        )
        return self.source[low:high], self.start + np.arange(low, high), rows


class Planner:
    """Plans the batches of one stage, whose earlier stages consumed what `records` say.

    Not thread-safe: cursors of packed sources keep the blocks that they packed last.
    """

    def __init__(
        self,
        index: DataIndex,
        records: Sequence[StageRecord],
        record: StageRecord,
    ) -> None:
        """records: of the stages before; record: of this stage (its samples and marks say where it goes on)."""
        self._index = mine = index.stages[record.index]
        past, rule = histories(records, index), rule_of(record)
        new = Visit(record.seq_len, 0, None, rule)
        self._cursors: dict[int, Cursor] = {}
        self._offsets: dict[int, int] = {}
        self._hashes = np.frombuffer(b"".join(source.fingerprint for source in mine.sources), "V32")
        for number in np.flatnonzero(mine.weights).tolist():
            key = mine.order_key(number)
            before = past.get(key, [])
            offset = 0
            if before and before[-1].same_rows(new):
                # the same length goes on in the same rows: a boundary that changes only the mixture costs nothing
                last = before.pop()
                offset, mark = last.rows, record.marks.get(key, last.mark)
            else:
                mark = record.marks.get(key)
            order = index.orders[key]
            if rule is None:
                self._cursors[number] = order.enter(before, record.seq_len, mark)
            else:
                assert isinstance(order, PackedOrder), "checked when the index was built"
                self._cursors[number] = order.enter(before, record.seq_len, mark, rule)
            self._offsets[number] = offset

    def plan(self, start: int, stop: int) -> Plan:
        """The rows of samples start .. stop-1 of the stage."""
        source, counter = self._index.table.draws(start, stop)
        n = stop - start
        parts = []
        counts = np.empty(n, np.int64)
        for number in np.unique(source).tolist():
            mine = np.flatnonzero(source == number)
            rows = self._cursors[number].rows(counter[mine] + self._offsets[number])
            counts[mine] = np.diff(rows.offsets)
            parts.append((mine, rows))
        offsets = np.zeros(n + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        starts, lengths = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.int64)
        for mine, rows in parts:
            target, _ = ragged_index(offsets[mine], counts[mine])
            starts[target], lengths[target] = rows.starts, rows.lengths
        merged = Rows(offsets, starts, lengths)
        digest = self._digest(source, merged)
        return Plan(start, source.astype(np.int64), merged, digest, self._marks(source, counter))

    def _marks(self, source: np.ndarray, counter: np.ndarray) -> dict[str, list[int]]:
        """By order key, where the drawn rows end, so that going on needs no search, or is possible at all."""
        numbers, last = np.unique(source[::-1], return_index=True)
        marks = {}
        for number, consumed in zip(numbers.tolist(), (counter[::-1][last] + 1).tolist()):
            mark = self._cursors[number].mark(consumed + self._offsets[number])
            if mark is not None:
                marks[self._index.order_key(number)] = [int(value) for value in mark]
        return marks

    @property
    def skipped_tokens(self) -> list[int | None]:
        """By source, what of the open epoch was given up by entering the stage; None where it is not drawn."""
        cursors = [self._cursors.get(number) for number in range(len(self._index.sources))]
        return [None if cursor is None else cursor.skipped_tokens for cursor in cursors]

    def _digest(self, source: np.ndarray, rows: Rows) -> str:
        """blake2b over (source content, piece starts, piece lengths) of every row in order."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self._hashes[source].tobytes())
        for values in (rows.offsets, rows.starts, rows.lengths):
            digest.update(values.astype("<i8").tobytes())
        return digest.hexdigest()
