"""Which files are read, and the fixed plan of pieces they are cut into.

The plan depends on the files alone, never on the number of workers, so the output does not either.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1 << 20, 64 << 20

_KINDS = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
ACCEPTED = ".txt, .jsonl, .ndjson, .json (one object a line), each also with .gz or .zst, and .parquet"


class InputError(ValueError):
    """Input that cannot be used; the message names the file, the value and the way out."""


@dataclass(frozen=True)
class InputFile:
    """One input file. `kind`: text, lines, jsonl or parquet; `compression`: "", gz or zst."""

    path: str
    kind: str
    compression: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Part:
    """A range of one file: bytes of a plain line file, row groups of a parquet file, else the whole file (0, 1)."""

    file: InputFile
    start: int
    stop: int
    cost_bytes: int


@dataclass(frozen=True)
class Piece:
    """What one worker turns into one shard: neighbouring parts of the input."""

    index: int
    parts: tuple[Part, ...]

    @property
    def cost_bytes(self) -> int:
        return sum(part.cost_bytes for part in self.parts)


def find_files(inputs: Sequence[str], *, text_lines: bool) -> list[InputFile]:
    """The files that files, folders and globs name, in the order given, sorted inside a folder or glob.

    Folders are searched for known endings, hidden entries left out. Raises InputError for an input that names
    nothing, an unknown ending, or a file named twice.
    """
    found: dict[str, InputFile] = {}
    for given in inputs:
        for path in _expand(given):
            real = os.path.realpath(path)
            if real in found:
                raise InputError(f"{path}: named twice (again by {given!r}); name each input once")
            found[real] = _describe(path, text_lines)
    if not found:
        raise InputError("no input files were given")
    return list(found.values())


def _expand(given: str) -> list[str]:
    if os.path.isdir(given):
        paths = [path for path in _walk(given) if _ending(path) is not None]
        if not paths:
            raise InputError(f"{given}: no input files in this folder; accepted are {ACCEPTED}")
        return paths
    if os.path.lexists(given):
        return [given]
    if glob.has_magic(given):
        paths = sorted(path for path in glob.glob(given, recursive=True) if os.path.isfile(path))
        if paths:
            return paths
        raise InputError(f"{given}: this pattern matches no file")
    raise InputError(f"{given}: no such file or folder")


def _walk(folder: str) -> Iterator[str]:
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _leads_back(base, name))
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.join(base, name)


def _leads_back(base: str, name: str) -> bool:
    """Whether the folder is a link to one that it lies in, which would be searched without end."""
    path = os.path.join(base, name)
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    return os.path.commonpath([target, os.path.realpath(base)]) == target


def _ending(path: str) -> tuple[str, str] | None:
    """(kind, compression) of a file name, None when it is not known."""
    stem, last = os.path.splitext(path.lower())
    compression = _COMPRESSIONS.get(last, "")
    kind = _KINDS.get(os.path.splitext(stem)[1] if compression else last)
    if kind is None or (kind == "parquet" and compression):
        return None
    return kind, compression


def _describe(path: str, text_lines: bool) -> InputFile:
    ending = _ending(path)
    if ending is None:
        raise InputError(f"{path}: unknown ending; accepted are {ACCEPTED}")
    try:
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode):
            raise InputError(f"{path}: a pipe or device; text is read twice and in parts, so write it to a file first")
        with open(path, "rb"):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    kind, compression = ending
    if kind == "text" and text_lines:
        kind = "lines"
    return InputFile(path, kind, compression, facts.st_size, facts.st_mtime_ns)


def plan_pieces(files: Sequence[InputFile], text_field: str) -> list[Piece]:
    """Cut the files into pieces: big ones by byte ranges or row groups, small ones several to a piece.

    Some 500 pieces of 1 to 64 MiB keep workers equally busy, little lost by a kill, and few files for big inputs.
    """
    wanted = sum(file.size_bytes for file in files) // 512
    piece_bytes = min(max(1 << wanted.bit_length(), MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    pieces: list[Piece] = []
    parts: list[Part] = []
    filled = 0
    for file in files:
        for part in _parts(file, text_field, piece_bytes):
            if parts and filled + part.cost_bytes > piece_bytes:
                pieces.append(Piece(len(pieces), tuple(parts)))
                parts, filled = [], 0
            parts.append(part)
            filled += part.cost_bytes
    if parts:
        pieces.append(Piece(len(pieces), tuple(parts)))
    return pieces


def _parts(file: InputFile, text_field: str, piece_bytes: int) -> Iterator[Part]:
    if file.kind == "parquet":
        yield from _row_groups(file, text_field, piece_bytes)
    elif file.kind in ("jsonl", "lines") and not file.compression:
        for start in range(0, file.size_bytes, piece_bytes):
            stop = min(start + piece_bytes, file.size_bytes)
            yield Part(file, start, stop, stop - start)
    else:
        yield Part(file, 0, 1, file.size_bytes)


def _row_groups(file: InputFile, text_field: str, piece_bytes: int) -> Iterator[Part]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(file.path)
        paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file.path}: not a readable parquet file ({error}); replace or remove it") from None
    if text_field not in paths:
        names = ", ".join(paths[:20])
        raise InputError(f"{file.path}: no column {text_field!r}; it has {names}; choose one with --text-field")
    rows = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    if rows != metadata.num_rows:
        raise InputError(f"{file.path}: damaged: {rows} rows of {metadata.num_rows} recorded; replace or remove it")
    # A group's share of the file by its size before compression: in damaged files pyarrow ends the process when asked
    # for that of a column's chunk.
    sizes = [max(0, metadata.row_group(group).total_byte_size) for group in range(metadata.num_row_groups)]
    start, cost, total = 0, 0, max(1, sum(sizes))
    for group, size in enumerate(sizes):
        cost += file.size_bytes * size // total
        if cost >= piece_bytes or group == metadata.num_row_groups - 1:
            yield Part(file, start, group + 1, cost)
            start, cost = group + 1, 0
