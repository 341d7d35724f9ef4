"""Documents of text from local files: .txt, .json, .jsonl (also .gz, .zst), .parquet, .arrow, save_to_disk folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

from megastage.data import decompress
from megastage.data.sources.base import SourceError
from megastage.data.sources.columnar import batches_from, column_names, data_files

_LINES = (".jsonl", ".ndjson", ".json")
_SUFFIXES = (*_LINES, ".txt", ".parquet", ".arrow")
_PACKINGS = ("", ".gz", ".zst")
_PROBE_BYTES = 1 << 16
_WHOLE_BYTES = 256 << 20  # hashed in a fraction of a second
_PAGES, _PAGE_BYTES = 256, 1 << 16
MAX_LINE_BYTES = 1 << 30


class Place(NamedTuple):
    """Where a document ends in a list of files: which file, where in it, and how many lines lie before.

    at: bytes (uncompressed) of a file of lines, rows of Parquet and Arrow, entries of a JSON array, 1 behind a .txt.
    """

    file: int
    at: int
    line: int


START = Place(0, 0, 0)


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


def page_key(files: list[Path]) -> bytes:
    """blake2b over the sizes of the files and sampled pages of each: the same for a copy, read in little time."""
    sizes = [file.stat().st_size for file in files]
    digest = hashlib.blake2b(str(sizes).encode(), digest_size=16)
    step = max(_PAGE_BYTES, sum(sizes) // _PAGES)
    for file, size in zip(files, sizes):
        with open(file, "rb") as opened:
            for position in range(0, size, step):
                opened.seek(position)
                digest.update(opened.read(_PAGE_BYTES))
    return digest.digest()


def documents(files: list[Path], field: str) -> Iterator[str]:
    """Every document in order; a .txt file is one document. Raises SourceError naming file and line."""
    return (text for text, _ in documents_from(files, field, START))


def documents_from(files: list[Path], field: str, place: Place) -> Iterator[tuple[str, Place]]:
    """The documents behind a place, each with the place behind it. `place` must be START or one that was given out."""
    for number in range(place.file, len(files)):
        here = place if number == place.file else Place(number, 0, 0)
        yield from _READERS[kind_of(files[number])](files[number], field, here)


def kind_of(file: Path) -> str:
    """How a text file is read, and what its places count: one of "txt", "array", "lines", "packed", "columns"."""
    suffix = _suffix(file)
    if suffix in (".parquet", ".arrow"):
        return "columns"
    if suffix == ".txt":
        return "txt"
    if suffix == ".json" and _is_array(file):
        return "array"
    return "packed" if _compression(file) else "lines"


def _suffix(file: Path) -> str | None:
    name = file.name.lower()
    for packing in _PACKINGS:
        for suffix in _SUFFIXES:
            if name.endswith(suffix + packing) and not (packing and suffix in (".parquet", ".arrow")):
                return suffix
    return None


def _compression(file: Path) -> str:
    return file.suffix[1:].lower() if file.suffix.lower() in _PACKINGS else ""


def _opened(file: Path) -> AbstractContextManager[tuple[BinaryIO, BinaryIO]]:
    return decompress.opened(file, _compression(file), SourceError)


def _is_array(file: Path) -> bool:
    with _opened(file) as (stream, _):
        return stream.read(_PROBE_BYTES).lstrip()[:1] == b"["


def _whole(file: Path, field: str, place: Place) -> Iterator[tuple[str, Place]]:
    if place.at == 0:
        with _opened(file) as (stream, _):
            yield _decode(file, stream.read(), ""), place._replace(at=1)


def _array(file: Path, field: str, place: Place) -> Iterator[tuple[str, Place]]:
    with _opened(file) as (stream, _):
        entries = _parse(file, stream.read(), "")
    for number in range(place.at, len(entries)):
        yield _text_of(file, f", entry {number}", entries[number], field), place._replace(at=number + 1)


def _lines(file: Path, field: str, place: Place) -> Iterator[tuple[str, Place]]:
    _, at, line = place
    with _opened(file) as (stream, _):
        _skip(file, stream, at)
        while content := stream.readline(MAX_LINE_BYTES):
            at, line = at + len(content), line + 1
            where = f", line {line}"
            if len(content) == MAX_LINE_BYTES:
                raise SourceError(f"{file}{where}: longer than {MAX_LINE_BYTES >> 20} MB; is this text, line by line?")
            if content.strip():
                yield _text_of(file, where, _parse(file, content, where), field), Place(place.file, at, line)


def _skip(file: Path, stream: BinaryIO, size: int) -> None:
    """Go to byte `size` of the text; compressed text is read up to there."""
    if not _compression(file):
        stream.seek(size)
        return
    while size > 0:
        skipped = len(stream.read(min(size, decompress.BLOCK_BYTES)))
        if not skipped:
            raise SourceError(f"{file}: shorter than when it was read before; put the text back as it was")
        size -= skipped


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


def _text_of(file: Path, where: str, entry: Any, field: str) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
        found = sorted(entry)[:8] if isinstance(entry, dict) else type(entry).__name__
        raise SourceError(f"{file}{where}: no text under {field!r} (found {found}); name the text field")
    value: str = entry[field]
    try:
        # half of a surrogate pair, which JSON can write but no tokenizer reads
        return value if value.isascii() else value.encode("utf-8").decode("utf-8")
    except UnicodeEncodeError as error:
        raise SourceError(f"{file}{where}: {field!r} is no Unicode text (character {error.start}); repair it") from None


def _columns(file: Path, field: str, place: Place) -> Iterator[tuple[str, Place]]:
    names = column_names(file)
    if field not in names:
        raise SourceError(f"{file}: no column {field!r} (found {names}); name the text field")
    for batch, first in batches_from(file, (field,), place.at):
        column = batch.column(0)
        _check_column(file, column, first, field)
        for row in range(max(first, place.at), first + len(column)):
            value = column[row - first].as_py()
            if not isinstance(value, str):
                found = type(value).__name__
                raise SourceError(f"{file}: column {field!r} holds {found} in row {row}, expected text; drop the row")
            yield value, place._replace(at=row + 1)


def _check_column(file: Path, column: pa.Array, first: int, field: str) -> None:
    """Damaged row offsets would read beyond the file, and text must be UTF-8. first: the column's first row."""
    try:
        column.validate(full=True)
        return
    except pa.ArrowException as error:
        problem, row = str(error), first
    for number in range(len(column)):
        try:
            column.slice(number, 1).validate(full=True)
        except pa.ArrowException as error:
            problem, row = str(error), first + number
            break
    raise SourceError(f"{file}: column {field!r} is damaged in row {row} ({problem}); write the file again")


_READERS = {"txt": _whole, "array": _array, "lines": _lines, "packed": _lines, "columns": _columns}
