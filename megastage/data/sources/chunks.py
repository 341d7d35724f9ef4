"""Large text as a chain of chunks, tokenized one by one when they are needed, and kept in the node's cache for others.

A chunk is a run of whole documents with some MB of text. Where it ends is a function of the text, so that every
process that needs a chunk finds or makes the same one: the first to ask tokenizes it, the others map its file.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megastage.data.durable import write_atomically
from megastage.data.packed_memmap import (
    PackedMemmapError,
    PackedMemmapWriter,
    TokenizerFacts,
    open_packed_memmap,
    token_dtype,
    verify,
)
from megastage.data.sources import text
from megastage.data.sources.base import SourceError, SourceOptions
from megastage.data.sources.cache import Room, bytes_in, entry
from megastage.data.sources.encoding import batches, encode

MAX_CHARACTERS, MIN_CHARACTERS = 8 << 20, 1 << 16
_DOCUMENT_CHARACTERS = 64  # what a document counts beside its text, so that empty ones end a chunk too
_AHEAD, _TRIES = 3, 3
_TIDY_EVERY = 32  # chunks made between two looks at how much the cache holds
_TOKENS, _FACTS = "packed", "chunk.json"


class ChunkStart(NamedTuple):
    """Where a chunk begins: its number, its place in the text, and the documents and tokens that lie before it.

    row counts documents that give tokens.
    """

    number: int
    place: text.Place
    row: int
    token: int

    def to_list(self) -> list[int]:
        """Six integers."""
        return [self.number, *self.place, self.row, self.token]

    @classmethod
    def from_list(cls, values: list[int]) -> ChunkStart:
        """The inverse of `to_list`."""
        number, file, at, line, row, token = values
        return cls(number, text.Place(file, at, line), row, token)


FIRST = ChunkStart(0, text.START, 0, 0)


@dataclass(frozen=True)
class Chunk:
    """tokens: uint16 or uint32[n]; doc_ends: int64[d], within the chunk, as read-only maps; next: None at the end.

    crc32: of tokens and document ends; characters: of its text.
    """

    start: ChunkStart
    next: ChunkStart | None
    tokens: np.ndarray
    doc_ends: np.ndarray
    crc32: int
    characters: int

    @cached_property
    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """First token (in the whole text's stream) and length of every document that has any: int64[n] each."""
        starts = np.concatenate(([0], self.doc_ends[:-1])) if self.doc_ends.size else self.doc_ends
        full = np.flatnonzero(self.doc_ends > starts)
        return starts[full] + self.start.token, (self.doc_ends - starts)[full]


def chunk_characters(files: list[Path]) -> int:
    """Characters of text in a chunk: a 64th of small text, so that reading begins at once."""
    return min(MAX_CHARACTERS, max(MIN_CHARACTERS, sum(file.stat().st_size for file in files) // 64))


class TextChunks:
    """The chunks of a list of text files. `open` may be called from any thread."""

    def __init__(self, files: list[Path], folder: Path, tokenizer: Any, options: SourceOptions) -> None:
        """folder: of this text's chunks in the cache."""
        self._files, self._folder, self._tokenizer, self._field = files, folder, tokenizer, options.text_field
        self._options = replace(options, cache_folder=folder, may_build=True)
        self._facts = [_facts(file) for file in files]
        self._characters = chunk_characters(files)
        self._kinds: dict[int, str] = {}
        self._reader: tuple[text.Place, Iterator[tuple[str, text.Place]]] | None = None
        self._building = threading.Lock()
        self._verified: set[int] = set()
        self._looking: threading.Thread | None = None
        self._front = -1
        self._closed = False

    def open(self, start: ChunkStart, *, ahead: bool = False) -> Chunk:
        """The chunk that begins there. ahead: have those behind it made in the background.

        Raises SourceError naming file and line where its text is bad.
        """
        chunk = self._load(start)
        if chunk is None:
            with self._alone():
                chunk = self._load(start, repair=True) or self._make(start)
        behind = chunk.next if ahead else None
        if behind is not None and (start.number > self._front or not self._path(behind.number).exists()):
            self._begin_ahead(chunk)
        return chunk

    def close(self) -> None:
        """Stop making chunks ahead; one that is half made is dropped."""
        self._closed = True
        if self._looking is not None:
            self._looking.join()
        self._reader = None

    def _begin_ahead(self, chunk: Chunk) -> None:
        self._front = max(self._front, chunk.start.number)
        if self._closed or (self._looking is not None and self._looking.is_alive()):
            return
        self._looking = threading.Thread(target=self._look_ahead, args=(chunk,), name="text-ahead", daemon=True)
        self._looking.start()

    def _look_ahead(self, chunk: Chunk) -> None:
        """Make what lies behind `chunk`. What goes wrong is raised when the chunk is asked for."""
        with suppress(Exception):
            for _ in range(_AHEAD):
                if chunk.next is not None and not self._closed:
                    chunk = self.open(chunk.next)

    def _path(self, number: int) -> Path:
        return self._folder / f"chunk-{number:08d}"

    def _load(self, start: ChunkStart, *, repair: bool = False) -> Chunk | None:
        """The chunk as it lies in the cache; None where it is missing or damaged. repair: then remove what is left."""
        folder = self._path(start.number)
        try:
            facts = json.loads((folder / _FACTS).read_bytes())
            if facts["crc32"] != _crc32(facts):
                raise PackedMemmapError(f"{folder / _FACTS}: damaged")
            tokens, ends = np.empty(0, np.uint16), np.empty(0, np.int64)
            if facts["n_tokens"]:
                first = start.number not in self._verified
                data = (verify if first else open_packed_memmap)(folder / _TOKENS)
                tokens, ends = data.tokens, data.doc_ends.view(np.int64)
            self._verified.add(start.number)
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError) as error:
            # one that another process has just finished is whole: it must not go
            torn = not isinstance(error, FileNotFoundError) or (folder.is_dir() and not (folder / _FACTS).exists())
            if repair and torn:
                shutil.rmtree(folder, ignore_errors=True)
            return None
        with suppress(OSError):
            for used in (self._folder, folder / _FACTS):  # what was used last is removed last
                os.utime(used)
        if facts["start"] != start.to_list():
            raise SourceError(
                f"{self._files[0]} and what follows it: {folder} begins at {facts['start']} of it, but the run, or its "
                f"checkpoint, expects {start.to_list()}: the text has changed while it was read; put it back as it was"
            )
        behind = None if facts["next"] is None else ChunkStart.from_list(facts["next"])
        return Chunk(start, behind, tokens, ends, facts["tokens_crc32"], facts["characters"])

    def _make(self, start: ChunkStart) -> Chunk:
        """Tokenize a chunk into the cache. Called by one thread at a time."""

        def build(folder: Path) -> None:
            self._build(start, folder)

        for _ in range(_TRIES):  # another process may remove it to make room
            entry(self._path(start.number).name, self._options, build, "tokenizes it")
            self._verified.add(start.number)
            if start.number % _TIDY_EVERY == _TIDY_EVERY - 1:
                self._tidy(start.number)
            chunk = self._load(start, repair=True)
            if chunk is not None:
                return chunk
        raise SourceError(f"{self._path(start.number)}: gone or damaged as soon as it was written; check the disk")

    def _build(self, start: ChunkStart, folder: Path) -> None:
        tokenizer = self._tokenizer
        facts = TokenizerFacts(tokenizer.name, tokenizer.sha256, tokenizer.vocab_size)
        taken = _Taken(self._read_from(start.place), start.place, self._characters)
        rows = 0
        writer = PackedMemmapWriter(
            folder / _TOKENS, token_dtype(tokenizer.vocab_size), eos_id=tokenizer.eos_id, tokenizer=facts
        )
        try:
            for texts in batches(taken):
                if self._closed:
                    raise _Closed
                tokens, lengths = encode(texts, tokenizer)
                writer.extend(tokens, lengths)
                rows += int(np.count_nonzero(lengths))
            self._check_files(start.place.file, taken.place.file)
        except BaseException:
            writer.abort()
            raise
        crc32, n_tokens, behind = 0, writer.n_tokens, None
        if n_tokens:
            metadata = writer.finish()
            crc32 = zlib.crc32(metadata.documents_crc32.to_bytes(4, "little"), metadata.pages_crc32)
        else:
            writer.abort()
        if not taken.ended:
            behind = ChunkStart(start.number + 1, taken.place, start.row + rows, start.token + n_tokens).to_list()
            self._reader = (taken.place, taken.documents)
        content = {
            "start": start.to_list(), "next": behind, "n_tokens": n_tokens, "tokens_crc32": crc32,
            "characters": taken.characters,
        }  # fmt: skip
        content["crc32"] = _crc32(content)
        write_atomically(folder / _FACTS, json.dumps(content).encode())

    def _read_from(self, place: text.Place) -> Iterator[tuple[str, text.Place]]:
        """The documents behind a place. A reader that stands before it, in a file that can't be entered, goes there."""
        held, self._reader = self._reader, None
        if held is not None:
            at, documents = held
            if at == place:
                return documents
            if at < place and at.file == place.file and self._kind(place.file) != "lines":
                for _, at in documents:
                    if at >= place:
                        break
                if at == place:
                    return documents
        return text.documents_from(self._files, self._field, place)

    def _kind(self, number: int) -> str:
        if number not in self._kinds:
            self._kinds[number] = text.kind_of(self._files[number])
        return self._kinds[number]

    def _check_files(self, first: int, last: int) -> None:
        for number in range(first, min(last + 1, len(self._files))):
            if _facts(self._files[number]) != self._facts[number]:
                raise SourceError(
                    f"{self._files[number]}: has changed since the run began; text must stay as it is while it is read"
                )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread of one process at a time, where the file system has locks; without, work is done twice at most."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._building, open(self._folder / "lock", "ab") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _tidy(self, newest: int) -> None:
        """Keep the cache within its limit: what nobody uses goes, then the chunks used longest ago.

        They are made again when they are needed.
        """
        room = Room(self._folder.parent, str(self._folder))
        with suppress(SourceError):
            room.take(0)
            return
        excess, used = room.excess(), {}
        for folder in self._folder.glob("chunk-*"):
            with suppress(OSError):
                used[folder] = (folder / _FACTS).stat().st_mtime_ns
        used.pop(self._path(newest), None)
        for folder in sorted(used, key=lambda folder: used[folder]):
            if excess <= 0:
                return
            excess -= bytes_in(folder)
            shutil.rmtree(folder, ignore_errors=True)


class _Closed(Exception):
    """The source was closed while a chunk was being made ahead."""


class _Taken:
    """The next documents of a reader, until they make a chunk; `place` is then where they end."""

    def __init__(self, documents: Iterator[tuple[str, text.Place]], place: text.Place, size: int) -> None:
        self.documents, self.place, self._left = documents, place, size
        self.characters, self.ended = 0, False

    def __iter__(self) -> Iterator[str]:
        while self._left > 0:
            document = next(self.documents, None)
            if document is None:
                self.ended = True
                return
            content, self.place = document
            self.characters += len(content)
            self._left -= len(content) + _DOCUMENT_CHARACTERS
            yield content


def _facts(file: Path) -> tuple[int, int]:
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns


def _crc32(content: dict[str, Any]) -> int:
    kept = {key: value for key, value in content.items() if key != "crc32"}
    return zlib.crc32(json.dumps(kept, sort_keys=True).encode())
