"""The order of `StreamOrder` for text that is tokenized while it is read: each stream walks along the chunks by itself.

What lies before a stream's place is not known again after a resume, so its mark is needed to go on there: without one
the streams walk from the beginning of the text, which is as exact and as slow as tokenizing all of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megastage.data.order import Rows, Visit, check_seq_len, ragged_index, saved
from megastage.data.sources.base import SourceError
from megastage.data.sources.chunks import FIRST, ChunkStart
from megastage.data.sources.live import LiveText
from megastage.data.streams import MAX_STREAMS, rows_by_stream


class StreamPlace(NamedTuple):
    """Where a stream stands: `offset` tokens of document `row` (of those with tokens, in its epoch) are consumed."""

    epoch: int
    row: int
    offset: int


@dataclass(frozen=True)
class LiveMark:
    """All streams' places after `drawn` rows of the source, and the chunks that they lie in with their checksums."""

    drawn: int
    chunks: list[tuple[ChunkStart, int]]  # ascending
    places: list[StreamPlace]

    def to_list(self) -> list[int]:
        """drawn, number of chunks, seven integers a chunk, three a stream."""
        numbers = [self.drawn, len(self.chunks)]
        for start, crc32 in self.chunks:
            numbers += [*start.to_list(), crc32]
        return numbers + [value for place in self.places for value in place]

    @classmethod
    def from_list(cls, name: str, values: Sequence[int], streams: int) -> LiveMark:
        """The inverse of `to_list`. Raises ValueError for other values or another number of them."""
        numbers = [value for value in values if isinstance(value, int) and value >= 0]
        drawn, n = numbers[:2] if len(numbers) > 1 else (0, 0)
        at = 2 + 7 * n
        if n < 1 or len(numbers) != len(values) or len(numbers) != at + 3 * streams:
            raise ValueError(
                f"{name}: the saved place has {len(numbers)} numbers for {n} chunks and {streams} streams; "
                "resume from another checkpoint"
            )
        chunks = [(ChunkStart.from_list(numbers[i : i + 6]), numbers[i + 6]) for i in range(2, at, 7)]
        places = [StreamPlace(*numbers[i : i + 3]) for i in range(at, len(numbers), 3)]
        return cls(drawn, chunks, places)


class LiveOrder:
    """The sample order of a `LiveText`."""

    def __init__(self, source: LiveText, streams: int) -> None:
        self.name, self.source, self.streams = source.path, source, streams

    @classmethod
    def make(cls, source: LiveText, settings: Mapping[str, Any] | None = None) -> LiveOrder:
        """With the number of streams that the source can feed, or the one in saved `settings`."""
        streams = source.streams
        if settings is not None:
            streams = saved(source.path, settings, "live").get("streams", 0)
            if not 1 <= streams <= MAX_STREAMS:
                raise ValueError(f"{source.path}: the saved sample order has streams = {streams!r}")
        return cls(source, streams)

    def settings(self) -> dict[str, Any]:
        return {"kind": "live", "streams": self.streams}

    def enter(self, history: Sequence[Visit], seq_len: int, mark: Sequence[int] | None = None) -> LiveCursor:
        """See `Order.enter`. Without a mark of this stage that of the last visit tells the place."""
        drawn, position = 0, np.zeros(self.streams, np.int64)
        for visit in history:
            position += rows_by_stream(self.streams, drawn, drawn + visit.rows) * visit.seq_len
            drawn += visit.rows
        if mark is None and history:
            mark = history[-1].mark
        known = None if mark is None else LiveMark.from_list(self.name, mark, self.streams)
        return LiveCursor(self, drawn, position, seq_len, known)

    def planned_epochs(self, history: Sequence[Visit]) -> float:
        """By the estimated number of tokens."""
        return sum(v.rows * v.seq_len for v in history) / self.source.n_tokens


@dataclass(frozen=True)
class _Segment:
    """A stream's documents of one chunk, of which there is at least one. Counted in tokens of the endless stream:
    begin of the first, ends int64[n] of all; starts int64[n]: in the source's stream; lengths int64[n]."""

    epoch: int
    start: ChunkStart
    next: ChunkStart | None
    crc32: int
    first_row: int
    begin: int
    ends: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def end(self) -> int:
        return int(self.ends[-1])


class LiveCursor:
    """A stage's rows. position: int64[streams], the tokens of each stream that were consumed before the stage."""

    skipped_tokens = 0

    def __init__(self, order: LiveOrder, drawn: int, position: np.ndarray, seq_len: int, mark: LiveMark | None) -> None:
        """Raises ValueError for a mark made before the stage."""
        self._order, self._drawn, self._position = order, drawn, position
        self._length, self._mark = check_seq_len(order.name, seq_len), mark
        self._segments: list[list[_Segment]] = [[] for _ in range(order.streams)]
        if mark is not None and mark.drawn < drawn:
            raise ValueError(f"{order.name}: the saved place is after {mark.drawn} rows, but {drawn} were consumed")

    def rows(self, counters: np.ndarray) -> Rows:
        """See `Cursor.rows`. Rows before the mark that the stage was entered with can't be read."""
        streams, counters = self._order.streams, np.asarray(counters, np.int64)
        stream = (self._drawn + counters) % streams
        earlier = (counters - (stream - self._drawn) % streams) // streams
        begin = self._position[stream] + earlier * self._length
        counts = np.empty(counters.size, np.int64)
        parts = []
        for number in np.unique(stream).tolist():
            mine = np.flatnonzero(stream == number)
            counts[mine], starts, lengths = self._cut(number, begin[mine])
            parts.append((mine, starts, lengths))
        offsets = np.concatenate(([0], np.cumsum(counts)))
        all_starts, all_lengths = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.int64)
        for mine, starts, lengths in parts:
            target, _ = ragged_index(offsets[mine], counts[mine])
            all_starts[target], all_lengths[target] = starts, lengths
        return Rows(offsets, all_starts, all_lengths)

    def _cut(self, stream: int, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows that begin at these tokens of one endless stream: number of pieces of each, their starts and lengths."""
        segments = self._cover(stream, int(begin.min()), int(begin.max()) + self._length)
        ends, starts, sizes = (
            np.concatenate([getattr(segment, name) for segment in segments]) for name in ("ends", "starts", "lengths")
        )
        first = np.searchsorted(ends, begin, "right")
        count = np.searchsorted(ends, begin + self._length, "left") - first + 1
        document, row = ragged_index(first, count)
        doc_begin = ends[document] - sizes[document]
        low = np.maximum(begin[row], doc_begin)
        lengths = np.minimum(begin[row] + self._length, ends[document]) - low
        return count, starts[document] + low - doc_begin, lengths

    def _cover(self, stream: int, low: int, high: int) -> list[_Segment]:
        """The segments that hold tokens low .. high of an endless stream; those before are let go."""
        segments = self._segments[stream]
        if not segments or low < segments[0].begin:
            segments[:] = [self._entry(stream)]
        if low < segments[0].begin:
            raise ValueError(f"{self._order.name}: rows before the place at which the stage was entered")
        while True:
            while len(segments) > 1 and segments[0].end < low:
                segments.pop(0)
            if segments[-1].end >= high:
                return segments
            last = segments[-1]
            segments.append(self._walk(stream, last.epoch, last.next, last.end))

    def _entry(self, stream: int) -> _Segment:
        """Where the stream stood at the mark, or at the beginning of the text."""
        if self._mark is None:
            return self._walk(stream, 0, FIRST, 0)
        streams, place = self._order.streams, self._mark.places[stream]
        chunks = self._mark.chunks
        start, crc32 = chunks[max(0, bisect_right(chunks, place.row, key=lambda chunk: chunk[0].row) - 1)]
        segment = self._segment(stream, place.epoch, start, 0)
        at = -1 if segment is None else (place.row - segment.first_row) // streams
        if segment is None or segment.crc32 != crc32 or not 0 <= at < segment.ends.size:
            raise SourceError(
                f"{self._order.name}: its text, or what the tokenizer makes of it, is not what it was when the "
                f"checkpoint was written, near document {place.row}; put back the text, or the versions of then"
            )
        read = rows_by_stream(streams, self._drawn, self._mark.drawn)[stream] * self._length
        begin = int(self._position[stream] + read) - place.offset - int(segment.ends[at] - segment.lengths[at])
        moved = self._segment(stream, place.epoch, start, begin)
        assert moved is not None
        return moved

    def _walk(self, stream: int, epoch: int, start: ChunkStart | None, begin: int) -> _Segment:
        """The next documents of a stream from a chunk on (None: from the beginning of the next epoch)."""
        began = epoch
        while epoch <= began + 1:
            if start is None:
                epoch, start = epoch + 1, FIRST
            segment = self._segment(stream, epoch, start, begin)
            if segment is not None:
                return segment
            start = self._order.source.chunk(start).next
        raise SourceError(f"{self._order.name}: no text for virtual stream {stream} of {self._order.streams}")

    def _segment(self, stream: int, epoch: int, start: ChunkStart, begin: int) -> _Segment | None:
        """The stream's documents of a chunk, if it has any."""
        chunk = self._order.source.chunk(start, ahead=True)
        streams = self._order.streams
        first = (stream - start.row) % streams
        starts, lengths = (values[first::streams] for values in chunk.documents)
        if not starts.size:
            return None
        ends = np.cumsum(lengths) + begin
        return _Segment(
            epoch, start, chunk.next, chunk.crc32, start.row + first, begin, ends, starts, lengths
        )  # fmt: skip

    def epoch_at(self, counter: int) -> float:
        return (int(self._position.sum()) + counter * self._length) / self._order.source.n_tokens

    def mark(self, consumed: int) -> list[int]:
        """See `Cursor.mark`; quick for the rows that were read last."""
        order = self._order
        position = self._position + rows_by_stream(order.streams, self._drawn, self._drawn + consumed) * self._length
        chunks: dict[ChunkStart, int] = {}
        places = []
        for stream, at in enumerate(position.tolist()):
            segments = self._cover(stream, at, at)
            segment = next(segment for segment in segments if segment.end >= at)
            document = int(np.searchsorted(segment.ends, at, "left"))
            offset = at - int(segment.ends[document] - segment.lengths[document])
            places.append(StreamPlace(segment.epoch, segment.first_row + document * order.streams, offset))
            chunks[segment.start] = segment.crc32
        return LiveMark(self._drawn + consumed, sorted(chunks.items()), places).to_list()
