"""Arrow and Parquet files as record batches, by pyarrow alone."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megastage.data.sources.base import SourceError

_BATCH_ROWS, _BATCH_BYTES = 1 << 16, 16 << 20
_BUFFER_BYTES = 1 << 20
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
_OLD_END = b"\0\0\0\0"  # before Arrow 0.15


def data_files(path: Path) -> list[Path]:
    """The Arrow/Parquet files of a data set in their order: state.json's where there is one, else sorted names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SourceError(f"{path}: no such file or folder")
    state = path / "state.json"
    if state.is_file():
        try:
            names = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SourceError(f"{state}: not readable ({error!r}); save the data set again") from None
        files = [path / Path(str(name)).name for name in names]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise SourceError(f"{state}: lists {missing[0]}, which is missing; copy the whole folder again")
    else:
        files = sorted(file for file in path.iterdir() if file.suffix in (".arrow", ".parquet"))
    if not files:
        split = sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file())
        hint = f"it holds the splits {', '.join(split)}: name one of them" if split else "expected *.arrow or *.parquet"
        raise SourceError(f"{path}: holds no Arrow or Parquet files; {hint}")
    return files


def column_names(file: Path) -> list[str]:
    """The columns of a file. Raises SourceError for files pyarrow refuses."""
    if file.suffix == ".parquet":
        with _errors_named(file):
            return list(pq.read_schema(file).names)
    with _errors_named(file), pa.memory_map(str(file)) as source:
        return list(_ipc_reader(source).schema.names)


def record_batches(file: Path, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """Record batches of one file, only the named columns it has: views of a map, or decoded some 16 MB at a time.

    Raises SourceError for files pyarrow refuses.
    """
    if file.suffix == ".parquet":
        yield from _parquet_batches(file, columns)
        return
    with _errors_named(file), pa.memory_map(str(file)) as source:
        reader = _ipc_reader(source)
        names = [name for name in reader.schema.names if name in columns]
        if isinstance(reader, pa.RecordBatchFileReader):
            for i in range(reader.num_record_batches):
                yield reader.get_batch(i).select(names)
            return
        stop = source.tell()
        for batch in reader:
            stop = source.tell()
            yield batch.select(names)
        _check_end(file, stop)


def _check_end(file: Path, stop: int) -> None:
    """A stream must go on, behind its last message, with its end mark and nothing more.

    pyarrow takes the end of the file for the end of the stream, also where the file was cut between two messages.
    """
    with open(file, "rb") as opened:
        opened.seek(stop)
        end = opened.read(len(_END) + 1)
    if end not in (_END, _OLD_END):
        found = "has more data behind" if end.startswith((_END, _OLD_END)) else "ends without"
        raise SourceError(
            f"{file}: {found} the mark that ends an Arrow stream: it is truncated, or files were joined; write it again"
        )


def batches_from(file: Path, columns: tuple[str, ...], row: int) -> Iterator[tuple[pa.RecordBatch, int]]:
    """As `record_batches`, from the batch on that holds `row`, each with the number of its first row."""
    skipped = 0
    if file.suffix == ".parquet" and row:
        with _errors_named(file):
            table = pq.read_metadata(file)
        ends = list(accumulate(max(0, table.row_group(i).num_rows) for i in range(table.num_row_groups)))
        skipped = bisect_right(ends, row)
    first = ends[skipped - 1] if skipped else 0
    batches = _parquet_batches(file, columns, skipped) if skipped else record_batches(file, columns)
    for batch in batches:
        if first + batch.num_rows > row:
            yield batch, first
        first += batch.num_rows


def _ipc_reader(source: Any) -> Any:
    """A reader of the stream or, as other tools write it, the file format of Arrow IPC."""
    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source)


def _parquet_batches(file: Path, columns: tuple[str, ...], first_group: int = 0) -> Iterator[pa.RecordBatch]:
    with (
        _errors_named(file),
        pq.ParquetFile(file, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True) as table,
    ):
        names = [name for name in table.schema_arrow.names if name in columns]
        row_bytes = encoded_bytes(table.metadata) // max(1, table.metadata.num_rows)
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))
        found = 0
        # no threads: after an error in one column they would go on reading another from a file that is closed
        groups = range(first_group, table.metadata.num_row_groups)
        recorded = table.metadata.num_rows - sum(table.metadata.row_group(i).num_rows for i in range(first_group))
        for batch in table.iter_batches(batch_size=rows, row_groups=groups, columns=names, use_threads=False):
            found += batch.num_rows
            yield batch
        if found != recorded:
            raise SourceError(
                f"{file}: its row groups give {found} rows, but {recorded} are recorded: the file is damaged, write it "
                "again"
            )


def parquet_bytes(file: Path) -> int:
    """As `encoded_bytes`, of a file. Raises SourceError for files pyarrow refuses."""
    with _errors_named(file):
        return encoded_bytes(pq.read_metadata(file))


def encoded_bytes(metadata: Any) -> int:
    """The size of a Parquet file's rows before compression, by its own account.

    Summed over row groups: in damaged files pyarrow ends the process when asked for the metadata of a column's chunk.
    """
    return sum(max(0, metadata.row_group(i).total_byte_size) for i in range(metadata.num_row_groups))


@contextmanager
def _errors_named(file: Path) -> Iterator[None]:
    try:
        yield
    except SourceError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise SourceError(f"{file}: not readable as {file.suffix or 'Arrow'} ({error}); write it again") from error
