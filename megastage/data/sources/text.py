"""Documents of text from local files: .txt, .json, .jsonl (also .gz, .zst), .parquet, .arrow, save_to_disk folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from megastage.data import decompress
from megastage.data.sources.base import SourceError
from megastage.data.sources.columnar import column_names, data_files, record_batches

_LINES = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (*_LINES, ".txt", ".parquet", ".arrow")
_PACKINGS = ("", ".gz", ".zst")
_PROBE_BYTES = 1 << 16
_WHOLE_BYTES = 256 << 20  # hashed in a fraction of a second
_PAGES, _PAGE_BYTES = 256, 1 << 16


def text_files(path: Path) -> list[Path]:
    """The text files that `path` stands for, in a fixed order."""
    if path.is_file():
        if _suffix(path) is None:
            raise SourceError(f"{path}: not a known kind of text file; expected {', '.join(_SUFFIXES)} (or .gz, .zst)")
        return [path]
    if (path / "state.json").is_file():
        return data_files(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) and file.name[0] != ".")
    if not files:
        raise SourceError(f"{path}: holds no text files ({', '.join(_SUFFIXES)}, the first four also as .gz or .zst)")
    return files


def content_key(files: list[Path]) -> bytes:
    """blake2b over names and contents: an edited file gives another key, a copy the same.

    Of files of more than _WHOLE_BYTES, sampled pages stand for the content, together with their times of change
    (which no program can set back), so a copy of these is another content.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size}\n".encode())
        with open(file, "rb") as opened:
            if facts.st_size <= _WHOLE_BYTES:
                while block := opened.read(1 << 20):
                    digest.update(block)
                continue
            digest.update(f"{facts.st_mtime_ns} {facts.st_ctime_ns}\n".encode())
            for page in range(_PAGES):
                opened.seek((facts.st_size - _PAGE_BYTES) * page // (_PAGES - 1))
                digest.update(opened.read(_PAGE_BYTES))
    return digest.digest()


def documents(files: list[Path], field: str) -> Iterator[str]:
    """Every document in order; a .txt file is one document. Raises SourceError naming file and line."""
    for file in files:
        suffix = _suffix(file)
        if suffix in (".parquet", ".arrow"):
            yield from _columnar(file, field)
        elif suffix == ".txt":
            with _opened(file) as (stream, _):
                yield _decode(file, stream.read(), "")
        elif suffix == ".json" and _is_array(file):
            with _opened(file) as (stream, _):
                yield from _objects(file, _parse(file, stream.read(), ""), field)
        else:
            yield from _lines(file, field)


def _suffix(file: Path) -> str | None:
    name = file.name.lower()
    for packing in _PACKINGS:
        for suffix in _SUFFIXES:
            if name.endswith(suffix + packing) and not (packing and suffix in (".parquet", ".arrow")):
                return suffix
    return None


def _opened(file: Path) -> AbstractContextManager[tuple[BinaryIO, BinaryIO]]:
    compression = file.suffix[1:].lower() if file.suffix.lower() in _PACKINGS else ""
    return decompress.opened(file, compression, SourceError)


def _is_array(file: Path) -> bool:
    with _opened(file) as (stream, _):
        return stream.read(_PROBE_BYTES).lstrip()[:1] == b"["


def _lines(file: Path, field: str) -> Iterator[str]:
    with _opened(file) as (stream, _):
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield from _objects(file, [_parse(file, line, f", line {number}")], field, f", line {number}")


def _parse(file: Path, content: bytes, where: str) -> Any:
    try:
        return json.loads(_decode(file, content, where))
    except (ValueError, RecursionError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{file}{where}: no JSON ({error}); repair or drop it") from None


def _decode(file: Path, content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"{file}{where}: not UTF-8 (byte {error.start}); convert it") from None


def _objects(file: Path, entries: Any, field: str, where: str = "") -> Iterator[str]:
    for number, entry in enumerate(entries):
        here = where or f", entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
            found = sorted(entry)[:8] if isinstance(entry, dict) else type(entry).__name__
            raise SourceError(f"{file}{here}: no text under {field!r} (found {found}); name the text field")
        yield entry[field]


def _columnar(file: Path, field: str) -> Iterator[str]:
    names = column_names(file)
    if field not in names:
        raise SourceError(f"{file}: no column {field!r} (found {names}); name the text field")
    for batch in record_batches(file, (field,)):
        column = batch.column(0)
        try:
            column.validate(full=True)  # damaged row offsets would read beyond the file
        except pa.ArrowException as error:
            raise SourceError(f"{file}: column {field!r} is damaged ({error}); write the file again") from None
        for entry in column:
            value = entry.as_py()
            if not isinstance(value, str):
                raise SourceError(f"{file}: column {field!r} holds {type(value).__name__}, expected text")
            yield value
