"""Documents of one part of one file, with bad lines named by file and line."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from .inputs import InputError, InputFile, Part

STREAM_BYTES = 4 << 20
_BLOCK_BYTES = 1 << 20
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
    try:
        if file.kind == "parquet":
            yield from _parquet(part, text_field, progress)
        elif file.kind == "text":
            yield from _text(file, progress)
        else:
            yield from _lines(part, text_field, progress)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file.path}: damaged gzip data ({error}); compress it again or remove it") from None


def _lines(part: Part, text_field: str, progress: Progress) -> Iterator[str | Document | BadLine]:
    """Lines whose first byte lies in the part; the last one is read to its end."""
    file = part.file
    stop = part.stop if not file.compression else None
    with _open(file) as (stream, raw):
        if part.start:
            stream.seek(part.start - 1)
            stream.readline()
        first = position = stream.tell() if stop is not None else 0
        count, reported = 0, raw.tell()
        first_line: int | None = None if first else 1
        while stop is None or position < stop:
            line = stream.readline()
            if not line:
                break
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
            if count % 64 == 0 or len(line) > _BLOCK_BYTES:
                progress(raw.tell() - reported)
                reported = raw.tell()
        progress(raw.tell() - reported)


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
    with _open(file) as (stream, _):
        block = _without_bom(file, stream.read(_BLOCK_BYTES))
        while block:
            text = decoder.decode(block)
            if text:
                yield text
            block = stream.read(_BLOCK_BYTES)
    decoder.decode(b"", final=True)


def _parquet(part: Part, text_field: str, progress: Progress) -> Iterator[str | Document | BadLine]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = part.file.path
    try:
        with pq.ParquetFile(path, buffer_size=_BLOCK_BYTES, pre_buffer=False) as reader:
            row = 1 + sum(reader.metadata.row_group(i).num_rows for i in range(part.start))
            groups = range(part.start, part.stop)
            rows = sum(reader.metadata.row_group(i).num_rows for i in groups)
            done = reported = 0
            for batch in reader.iter_batches(batch_size=256, row_groups=list(groups), columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    for name in text_field.split(".")[1:] if "." in text_field else ():
                        value = value.get(name) if isinstance(value, dict) else None
                    result = _checked(value, text_field)
                    yield BadLine(f"{path}:row {row}", result.reason) if isinstance(result, BadLine) else result
                    row += 1
                done += batch.num_rows
                progress(part.cost_bytes * done // rows - reported)
                reported = part.cost_bytes * done // rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged parquet data ({error}); replace or remove it") from None


class _open:
    """A buffered stream of a file's uncompressed bytes, and the raw file under it for its position."""

    def __init__(self, file: InputFile) -> None:
        self._file = file

    def __enter__(self) -> tuple[BinaryIO, BinaryIO]:
        self._raw: BinaryIO = open(self._file.path, "rb", buffering=_BLOCK_BYTES)
        if self._file.compression == "gz":
            self._stream = cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=self._raw), _BLOCK_BYTES))
        elif self._file.compression == "zst":
            self._stream = cast(BinaryIO, io.BufferedReader(_zstd(self._file, self._raw), _BLOCK_BYTES))
        else:
            self._stream = self._raw
        return self._stream, self._raw

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._raw.close()


class _ZstdStream(io.RawIOBase):
    """zstandard's reader as a raw stream whose errors, a truncated file among them, name the file."""

    def __init__(self, file: InputFile, raw: BinaryIO, library: Any) -> None:
        self._file, self._raw, self._library = file, raw, library
        self._frame: Any = None  # the frame being read, None between frames
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._compressed = self._compressed or self._raw.read(1 << 17)
            if not self._compressed:
                if self._frame is not None:
                    raise InputError(f"{self._file.path}: the zstd data end early; compress it again or remove it")
                return 0
            self._decompress()
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        try:
            self._text = memoryview(self._frame.decompress(self._compressed))
        except self._library.ZstdError as error:
            raise InputError(f"{self._file.path}: damaged zstd data ({error}); compress it again") from None
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None


def _zstd(file: InputFile, raw: BinaryIO) -> io.RawIOBase:
    try:
        import zstandard
    except ImportError:
        raise InputError(f"{file.path}: .zst files need the library: pip install zstandard") from None
    return _ZstdStream(file, raw, zstandard)


def _without_bom(file: InputFile, content: bytes) -> bytes:
    for bom, name in _BOMS:
        if content.startswith(bom):
            raise InputError(f"{file.path}: is {name}, not UTF-8; convert it: iconv -f {name} -t UTF-8")
    return content.removeprefix(codecs.BOM_UTF8)


def _count_newlines(path: str, stop: int) -> int:
    count = 0
    with open(path, "rb") as stream:
        while stop > 0:
            block = stream.read(min(_BLOCK_BYTES, stop))
            if not block:
                break
            count += block.count(b"\n")
            stop -= len(block)
    return count
