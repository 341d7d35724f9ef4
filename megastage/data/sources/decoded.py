"""Encoded files decoded for reading at random: small ones in memory, large ones in Arrow files in the node's cache.

Parquet pages are encoded and mostly compressed, and Arrow files may be compressed, so they can't be mapped; decoding a
row group for every row read at random would cost thousands of times the row.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from megastage.data.durable import fsync_path
from megastage.data.sources.base import SourceError, SourceOptions
from megastage.data.sources.cache import Room, entry, find
from megastage.data.sources.columnar import column_names, parquet_bytes, record_batches

IN_MEMORY_BYTES = 64 << 20  # decoded, of all files of a data set together: every rank holds its own
_FOOTER_BYTES = 1 << 16
_ROWS = "rows.arrow"


class RowFiles:
    """The files of one data set as record batches of the named columns, all of which can be read at random."""

    def __init__(self, columns: tuple[str, ...], options: SourceOptions) -> None:
        self._columns, self._options, self._left = columns, options, IN_MEMORY_BYTES

    def batches(self, file: Path) -> Iterable[pa.RecordBatch]:
        """Views of an Arrow file, or of the plain copy of an encoded one, or decoded batches while there is memory.

        Raises SourceError for a damaged file, or where the copy is missing and this process must not make it.
        """
        if file.suffix != ".parquet" and not _is_compressed(file):
            return record_batches(file, self._columns)
        name = f"decoded-{_key(file, self._columns)}"
        if find(name, self._options) is None:
            held = self._in_memory(file)
            if held is not None:
                return held
        copy = entry(name, self._options, lambda folder: self._decode(file, folder), f"decodes {file}")
        return record_batches(copy / _ROWS, self._columns)

    def _in_memory(self, file: Path) -> list[pa.RecordBatch] | None:
        """The whole file decoded; None where that takes more memory than is left."""
        held, taken = [], 0
        recorded = parquet_bytes(file) if file.suffix == ".parquet" else file.stat().st_size
        if recorded > self._left:
            return None
        for batch in record_batches(file, self._columns):
            taken += batch.nbytes  # repeated values can take any amount more than is recorded
            if taken > self._left:
                return None
            held.append(batch)
        self._left -= taken
        return held

    def _decode(self, file: Path, folder: Path) -> None:
        room, writer, target = Room(folder.parent, str(file)), None, folder / _ROWS
        with pa.OSFile(os.fspath(target), "wb") as sink:
            for batch in record_batches(file, self._columns):
                room.take(batch.nbytes)
                writer = writer or pa.ipc.new_stream(sink, batch.schema)
                writer.write_batch(batch)
            if writer is None:
                raise SourceError(f"{file}: holds no rows")
            writer.close()
        fsync_path(target)


def _is_compressed(file: Path) -> bool:
    """Whether reading the first batch of an Arrow file takes memory of its own."""
    before = pa.total_allocated_bytes()
    first = next(record_batches(file, tuple(column_names(file))), None)
    return first is not None and pa.total_allocated_bytes() > before


def _key(file: Path, columns: tuple[str, ...]) -> str:
    """Names the content of a file as it lies here, without reading it: an edit changes its size or its time of change,
    which no program can set back, and mostly the footer, which says where everything is. A copy is another file."""
    facts = file.stat()
    with open(file, "rb") as opened:
        opened.seek(max(0, facts.st_size - _FOOTER_BYTES))
        digest = hashlib.blake2b(opened.read(), digest_size=16)
    digest.update(f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns} {columns}".encode())
    return digest.hexdigest()
