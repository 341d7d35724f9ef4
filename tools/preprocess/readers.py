"""Documents of one part of one file, with bad lines named by file and line."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from megastage.data.decompress import BLOCK_BYTES, opened

from .inputs import InputError, InputFile, Part

STREAM_BYTES = 4 << 20
MAX_LINE_BYTES = 1 << 30
_BATCH_ROWS, _BATCH_BYTES = 256, 16 << 20
_BOMS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Document:
    """One document as one or more consecutive pieces of text (only long plain text comes in several)."""

    chunks: Iterator[str]


@dataclass(frozen=True)
class BadLine:
    """A line, row or file that is no document: where it is (`FILE:LINE`) and why."""

    where: str
    reason: str

    def error(self) -> InputError:
        return InputError(f"{self.where}: {self.reason}; repair it, or leave such lines out with --skip-bad")


def read_part(part: Part, text_field: str, progress: Progress) -> Iterator[str | Document | BadLine]:
    """Documents of a part in order: plain `str` mostly, `Document` for long text, `BadLine` for what is none.

    `progress` is called with input bytes read; over a part they sum to about its cost. Raises InputError when the
    file as a whole cannot be read or changed since it was planned.
    """
    file = part.file
    facts = os.stat(file.path)
    if (facts.st_size, facts.st_mtime_ns) != (file.size_bytes, file.mtime_ns):
        raise InputError(f"{file.path}: changed while it was being read; leave it alone and start again")
    if file.kind == "parquet":
        yield from _parquet(part, text_field, progress)
    elif file.kind == "text":
        yield from _text(file, progress)
    else:
        yield from _lines(part, text_field, progress)


def _lines(part: Part, text_field: str, progress: Progress) -> Iterator[str | Document | BadLine]:
    """Lines whose first byte lies in the part; the last one is read to its end."""
    file = part.file
    stop = part.stop if not file.compression else None
    with opened(file.path, file.compression, InputError) as (stream, raw):
        first = position = _first_line(stream, part.start, part.stop) if part.start else 0
        if first:
            stream.seek(first)
        count, reported = 0, raw.tell()
        first_line: int | None = None if first else 1
        while stop is None or position < stop:
            line = stream.readline(MAX_LINE_BYTES)
            if not line:
                break
            if len(line) == MAX_LINE_BYTES:
                raise InputError(f"{file.path}: a line of {MAX_LINE_BYTES:,} bytes or more; cut it into documents")
            if position == 0:
                line = _without_bom(file, line)
            result = _parse(line, text_field, file.kind)
            if isinstance(result, BadLine):
                if first_line is None:
                    first_line = 1 + _count_newlines(file.path, first)
                result = BadLine(f"{file.path}:{first_line + count}", result.reason)
            if result is not None:
                yield result
            position += len(line)
            count += 1
            if count % 64 == 0 or len(line) > BLOCK_BYTES:
                progress(raw.tell() - reported)
                reported = raw.tell()
        progress(raw.tell() - reported)


def _first_line(stream: BinaryIO, start: int, stop: int) -> int:
    """Where the first line that begins in bytes start .. stop - 1 does; `stop` if none does.

    Nothing further is read: a long line spans many parts, and each would read it to its end.
    """
    stream.seek(start - 1)
    position = start - 1
    while position < stop - 1:
        block = stream.read(min(BLOCK_BYTES, stop - 1 - position))
        if not block:
            break
        at = block.find(b"\n")
        if at >= 0:
            return position + at + 1
        position += len(block)
    return stop


def _parse(line: bytes, text_field: str, kind: str) -> str | BadLine | None:
    """The text of a line, None for a blank one."""
    if not line.strip():
        return None
    try:
        # Decoded here: given bytes, json guesses among UTF-8, 16 and 32.
        text = line.decode("utf-8").rstrip("\r\n")
        return text if kind == "lines" else _field(json.loads(text), text_field)
    except UnicodeDecodeError as error:
        return BadLine("", f"byte {error.start} is not UTF-8")
    except RecursionError:
        return BadLine("", "JSON nested too deeply")
    except ValueError as error:
        return BadLine("", f"not JSON: {error}")


def _field(row: Any, text_field: str) -> str | BadLine:
    value = row
    if isinstance(row, dict) and text_field in row:
        value = row[text_field]
    else:
        for name in text_field.split("."):
            if not isinstance(value, dict):
                return BadLine("", f"{_type(value)}, not an object with {name!r} (--text-field {text_field})")
            if name not in value:
                has = ", ".join(list(value)[:10]) or "nothing"
                return BadLine("", f"no field {name!r}, it has {has}; choose one with --text-field")
            value = value[name]
    return _checked(value, text_field)


def _checked(value: Any, text_field: str) -> str | BadLine:
    if isinstance(value, UnicodeDecodeError):
        return BadLine("", f"field {text_field!r} is not UTF-8 at byte {value.start}")
    if not isinstance(value, str):
        return BadLine("", f"field {text_field!r} is {_type(value)}, not a string")
    # isascii is one flag test; only other text can hold half of a surrogate pair.
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return BadLine("", f"field {text_field!r} holds half a surrogate pair at character {error.start}")
    return value


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _text(file: InputFile, progress: Progress) -> Iterator[str | Document | BadLine]:
    """A text file is one document; a long one is checked first and then streamed."""
    if not file.compression and file.size_bytes <= STREAM_BYTES:
        with open(file.path, "rb") as stream:
            content = _without_bom(file, stream.read())
        progress(file.size_bytes)
        try:
            yield content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            yield BadLine(f"{file.path}:{line}", f"not UTF-8 at byte {error.start}; the whole file is one document")
        return
    line = 1
    try:
        for text in _decoded(file):
            line += text.count("\n")
    except UnicodeDecodeError:
        yield BadLine(f"{file.path}:{line}", "not UTF-8 at or after this line; the whole file is one document")
        progress(file.size_bytes)
        return
    yield Document(_decoded(file))
    progress(file.size_bytes)


def _decoded(file: InputFile) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with opened(file.path, file.compression, InputError) as (stream, _):
        block = _without_bom(file, stream.read(BLOCK_BYTES))
        while block:
            text = decoder.decode(block)
            if text:
                yield text
            block = stream.read(BLOCK_BYTES)
    decoder.decode(b"", final=True)


def _parquet(part: Part, text_field: str, progress: Progress) -> Iterator[str | Document | BadLine]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = part.file.path
    try:
        options = {"buffer_size": BLOCK_BYTES, "pre_buffer": False, "page_checksum_verification": True}
        with pq.ParquetFile(path, **options) as reader:
            row = 1 + sum(reader.metadata.row_group(i).num_rows for i in range(part.start))
            groups = range(part.start, part.stop)
            rows = sum(reader.metadata.row_group(i).num_rows for i in groups)
            done = reported = 0
            batch_rows = _batch_rows(reader.metadata, groups)
            columns = {"columns": [text_field], "use_threads": False}  # a worker has one core
            for batch in reader.iter_batches(batch_size=batch_rows, row_groups=list(groups), **columns):
                for value in _values(batch.column(0)):
                    for name in text_field.split(".")[1:] if "." in text_field else ():
                        value = value.get(name) if isinstance(value, dict) else value
                    result = _checked(value, text_field)
                    yield BadLine(f"{path}:row {row}", result.reason) if isinstance(result, BadLine) else result
                    row += 1
                done += batch.num_rows
                progress(part.cost_bytes * done // max(1, rows) - reported)
                reported = part.cost_bytes * done // max(1, rows)
            if done != rows:
                raise InputError(f"{path}: damaged: gives {done} rows of {rows} recorded; replace or remove it")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged parquet data ({error}); replace or remove it") from None


def _batch_rows(metadata: Any, groups: range) -> int:
    """Rows to decode at a time: few where they are long on average, so that memory stays bounded."""
    rows = sum(metadata.row_group(i).num_rows for i in groups)
    size = sum(metadata.row_group(i).total_byte_size for i in groups)
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, size)))


def _values(column: Any) -> Iterator[Any]:
    """The rows of a column as Python objects; a UnicodeDecodeError stands for a row that is not UTF-8."""
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        for entry in column:
            try:
                value = entry.as_py()
            except UnicodeDecodeError as error:
                value = error
            yield value


def _without_bom(file: InputFile, content: bytes) -> bytes:
    for bom, name in _BOMS:
        if content.startswith(bom):
            raise InputError(f"{file.path}: is {name}, not UTF-8; convert it: iconv -f {name} -t UTF-8")
    return content.removeprefix(codecs.BOM_UTF8)


def _count_newlines(path: str, stop: int) -> int:
    count = 0
    with open(path, "rb") as stream:
        while stop > 0:
            block = stream.read(min(BLOCK_BYTES, stop))
            if not block:
                break
            count += block.count(b"\n")
            stop -= len(block)
    return count
