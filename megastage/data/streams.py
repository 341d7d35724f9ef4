"""The order of text read as it comes: document r goes to virtual stream r mod V, and each stream is cut into rows.

Draw i of the source is the next row of stream i mod V. The documents of a stream follow one another, epoch after epoch
in the same order, so rows are full, no token is skipped, and the position is one token offset per stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megastage.data.order import Rows, Visit, check_seq_len, ragged_index, saved

MAX_STREAMS = 64


def rows_by_stream(streams: int, start: int, stop: int) -> np.ndarray:
    """How many of the draws start..stop-1 each stream gives: int64[streams]."""
    before = (np.array([[start], [stop]]) - np.arange(streams) + streams - 1) // streams
    return before[1] - before[0]


class StreamOrder:
    """The sample order of documents with cumulative ends `doc_ends` (int64 or uint64 [n]; empty ones do not count)."""

    def __init__(self, doc_ends: np.ndarray, *, streams: int, name: str = "source") -> None:
        ends = np.asarray(doc_ends).astype(np.int64)
        starts = np.concatenate(([0], ends[:-1])) if ends.size else ends
        full = np.flatnonzero(ends > starts)
        if not 1 <= streams <= full.size:
            raise ValueError(f"{name}: {full.size} documents with text cannot feed {streams} streams")
        self.name, self.streams = name, streams
        self.n_documents, self.n_tokens = int(ends.size), int(ends[-1])
        by_stream = np.argsort(np.arange(full.size) % streams, kind="stable")
        documents = full[by_stream]
        self.starts = starts[documents]  # stream after stream
        self.cumulative = np.cumsum(ends[documents] - starts[documents])  # over all streams
        self.counts = np.bincount(np.arange(full.size) % streams, minlength=streams)  # documents of each stream
        self.first = np.cumsum(self.counts) - self.counts
        self.offset = np.concatenate(([0], self.cumulative))[self.first]  # where each begins in `cumulative`
        self.sizes = np.diff(np.concatenate((self.offset, self.cumulative[-1:])))  # tokens of each stream

    @classmethod
    def make(cls, doc_ends: np.ndarray, settings: Mapping[str, Any] | None = None, name: str = "source") -> StreamOrder:
        """With the largest power of two up to 64 that the documents can feed, or the number in saved `settings`."""
        n_documents = int(doc_ends.size)
        if settings is not None:
            n_tokens = int(doc_ends[-1]) if n_documents else 0
            saved(name, settings, "streams", n_documents=n_documents, n_tokens=n_tokens)
            return cls(doc_ends, streams=settings["streams"], name=name)
        full = int((np.diff(np.asarray(doc_ends).astype(np.int64), prepend=0) > 0).sum())
        return cls(doc_ends, streams=min(MAX_STREAMS, 1 << max(0, full.bit_length() - 1)), name=name)

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "streams",
            "n_documents": self.n_documents,
            "n_tokens": self.n_tokens,
            "streams": self.streams,
        }

    def enter(self, history: Sequence[Visit], seq_len: int, mark: Sequence[int] | None = None) -> StreamCursor:
        """See `Order.enter`; marks are not needed here."""
        drawn, position = 0, np.zeros(self.streams, np.int64)
        for visit in history:
            position += rows_by_stream(self.streams, drawn, drawn + visit.rows) * visit.seq_len
            drawn += visit.rows
        return StreamCursor(self, drawn, position, seq_len)

    def planned_epochs(self, history: Sequence[Visit]) -> float:
        return sum(v.rows * v.seq_len for v in history) / self.n_tokens


class StreamCursor:
    """A stage's rows. position: int64[streams], the tokens of each stream that were consumed before."""

    skipped_tokens = 0

    def __init__(self, order: StreamOrder, drawn: int, position: np.ndarray, seq_len: int) -> None:
        self._order, self._drawn, self._position = order, drawn, position
        self._length = check_seq_len(order.name, seq_len)

    def rows(self, counters: np.ndarray) -> Rows:
        """See `Cursor.rows`. Any access pattern is served."""
        order, counters = self._order, np.asarray(counters, np.int64)
        stream = (self._drawn + counters) % order.streams
        earlier = (counters - (stream - self._drawn) % order.streams) // order.streams
        begin = self._position[stream] + earlier * self._length
        first = self._document(stream, begin)
        count = self._document(stream, begin + self._length - 1) - first + 1
        document, row = ragged_index(first, count)
        # the part of each document, in the coordinates of its endless stream, that lies inside the row
        stream, begin = stream[row], begin[row]
        epoch, document = np.divmod(document, order.counts[stream])
        document += order.first[stream]
        origin = epoch * order.sizes[stream] - order.offset[stream]
        doc_end = order.cumulative[document] + origin
        doc_begin = np.where(document > 0, order.cumulative[document - 1], 0) + origin
        low = np.maximum(begin, doc_begin)
        lengths = np.minimum(begin + self._length, doc_end) - low
        return Rows(np.concatenate(([0], np.cumsum(count))), order.starts[document] + low - doc_begin, lengths)

    def _document(self, stream: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Number of the document, over all epochs of its stream, that holds a token of the endless stream."""
        order = self._order
        epoch, within = np.divmod(position, order.sizes[stream])
        index = np.searchsorted(order.cumulative, within + order.offset[stream], side="right")
        return epoch * order.counts[stream] + index - order.first[stream]

    def epoch_at(self, counter: int) -> float:
        return (int(self._position.sum()) + counter * self._length) / self._order.n_tokens

    def mark(self, consumed: int) -> None:
        """Nothing is needed: positions are closed forms."""
        return None
