"""Large Parquet files, decoded once into Arrow files in the node's cache, which are mapped like any other.

Parquet pages are encoded and mostly compressed, so they can't be mapped; decoding a row group for every row read at
random would cost thousands of times the row. Small files are decoded into memory.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megastage.data.durable import fsync_path
from megastage.data.sources.base import SourceError, SourceOptions
from megastage.data.sources.cache import entry
from megastage.data.sources.columnar import encoded_bytes, record_batches
from megastage.data.sources.text import content_key

IN_MEMORY_BYTES = 64 << 20  # decoded
_ROWS = "rows.arrow"


def mapped(file: Path, columns: tuple[str, ...], options: SourceOptions) -> Path:
    """`file` itself, or for a large Parquet file the Arrow file that holds the same rows of the named columns.

    Raises SourceError for a damaged file, or where the copy is missing and this process must not make it.
    """
    if not is_large(file, columns):
        return file
    key = hashlib.blake2b(content_key([file]) + ",".join(columns).encode(), digest_size=16).hexdigest()

    def build(folder: Path) -> None:
        _decode(file, columns, folder / _ROWS)

    return entry(f"parquet-{key}", options, build, f"decodes {file}") / _ROWS


def is_large(file: Path, columns: tuple[str, ...]) -> bool:
    """Whether it is a Parquet file that takes too much memory for every rank to hold it decoded."""
    if file.suffix != ".parquet":
        return False
    try:
        if encoded_bytes(pq.read_metadata(file)) > IN_MEMORY_BYTES:
            return True
    except (pa.ArrowException, OSError, ValueError) as error:
        raise SourceError(f"{file}: not readable as .parquet ({error}); write it again") from error
    decoded = 0  # repeated values can take any amount more
    for batch in record_batches(file, columns):
        decoded += batch.nbytes
        if decoded > IN_MEMORY_BYTES:
            return True
    return False


def _decode(file: Path, columns: tuple[str, ...], target: Path) -> None:
    writer = None
    with pa.OSFile(os.fspath(target), "wb") as sink:
        for batch in record_batches(file, columns):
            writer = writer or pa.ipc.new_stream(sink, batch.schema)
            writer.write_batch(batch)
        if writer is None:
            raise SourceError(f"{file}: holds no rows")
        writer.close()
    fsync_path(target)
