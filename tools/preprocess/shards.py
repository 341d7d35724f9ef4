"""Shards: the tokens of one piece, written by one worker into the work folder, reused by a later run.

NNNNNN.tokens and NNNNNN.lengths hold the tokens and the documents' lengths; NNNNNN.json is written last and says
which piece, tokenizer and options they came from. A shard without it, or with other content, is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megastage.data.durable import close_discarded
from megastage.data.packed_memmap import token_dtype

from .inputs import Piece

MAX_EXAMPLES = 20
_LAYOUT = 1
_CHUNK_DOCUMENTS = 1 << 16
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Settings:
    """Everything but the input that decides a shard's bytes, and where shards go."""

    work_folder: str
    tokenizer_path: str
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int | None
    text_field: str
    skip_bad: bool
    library_version: str
    engine: str = "hf"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if token_dtype(self.vocab_size) == "uint16" else "<u4")

    def key(self, piece: Piece) -> str:
        """Identifies a shard's content: changed input, tokenizer or options give another key.

        `skip_bad` is left out on purpose: a shard without bad lines is the same either way.
        """
        facts = [_LAYOUT, self.tokenizer_sha256, self.vocab_size, self.eos_id, self.text_field, self.library_version]
        if self.engine != "hf":
            facts.append(self.engine)
        facts.extend(asdict(part) for part in piece.parts)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass
class ShardFacts:
    """The content of NNNNNN.json, and summed over all shards the figures of the summary."""

    key: str = ""
    tokens: int = 0
    documents: int = 0
    empty_documents: int = 0
    text_bytes: int = 0
    bad: int = 0
    examples: list[str] = field(default_factory=list)
    crc32: int = 0

    def add(self, other: ShardFacts) -> None:
        for name in ("tokens", "documents", "empty_documents", "text_bytes", "bad"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]


class ShardWriter:
    """Writes one shard under temporary names and renames it into place on `finish`."""

    def __init__(self, settings: Settings, piece: Piece) -> None:
        self.facts = ShardFacts(key=settings.key(piece))
        self._dtype = settings.dtype
        self._base = _base(settings, piece.index)
        self._temporary = {name: Path(f"{self._base}.{name}.tmp{os.getpid()}") for name in ("tokens", "lengths")}
        self._tokens: BinaryIO = open(self._temporary["tokens"], "wb", buffering=1 << 20)  # noqa: SIM115
        self._lengths: BinaryIO = open(self._temporary["lengths"], "wb", buffering=1 << 16)  # noqa: SIM115
        self._lengths_crc32 = 0

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens of the documents at hand."""
        content = tokens.astype(self._dtype).tobytes()
        self._tokens.write(content)
        self.facts.crc32 = zlib.crc32(content, self.facts.crc32)
        self.facts.tokens += tokens.size

    def end_documents(self, lengths: list[int]) -> None:
        """Record the lengths, in tokens, of documents whose tokens have been written."""
        content = np.array(lengths, dtype="<u8").tobytes()
        self._lengths.write(content)
        self._lengths_crc32 = zlib.crc32(content, self._lengths_crc32)
        self.facts.documents += len(lengths)

    def finish(self) -> ShardFacts:
        self._tokens.close()
        self._lengths.close()
        self.facts.crc32 ^= self._lengths_crc32
        for name, path in self._temporary.items():
            os.replace(path, f"{self._base}.{name}")
        temporary = Path(f"{self._base}.json.tmp{os.getpid()}")
        temporary.write_text(json.dumps(asdict(self.facts)), encoding="utf-8")
        os.replace(temporary, f"{self._base}.json")
        return self.facts

    def abort(self) -> None:
        close_discarded(self._tokens, self._lengths)
        for path in self._temporary.values():
            path.unlink(missing_ok=True)


def finished_shard(settings: Settings, piece: Piece) -> ShardFacts | None:
    """The facts of a shard that an earlier run finished for just this piece, None when it must be made."""
    base = _base(settings, piece.index)
    try:
        content: dict[str, Any] = json.loads(Path(f"{base}.json").read_text(encoding="utf-8"))
        facts = ShardFacts(**content)
        if facts.key != settings.key(piece) or (facts.bad and not settings.skip_bad):
            return None
        sizes = (facts.tokens * settings.dtype.itemsize, facts.documents * 8)
        crc32 = 0
        for name, size in zip(("tokens", "lengths"), sizes, strict=True):
            if os.path.getsize(f"{base}.{name}") != size:
                return None
            crc32 ^= _file_crc32(f"{base}.{name}")
        return facts if crc32 == facts.crc32 else None
    except (OSError, ValueError, TypeError):
        return None


def shard_documents(settings: Settings, index: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A shard's documents in bounded steps: (tokens, lengths of the documents they make up)."""
    base = _base(settings, index)
    if not os.path.getsize(f"{base}.tokens"):
        return
    tokens = np.memmap(f"{base}.tokens", dtype=settings.dtype, mode="r")
    lengths = np.memmap(f"{base}.lengths", dtype="<u8", mode="r")
    position = 0
    for start in range(0, lengths.size, _CHUNK_DOCUMENTS):
        part = lengths[start : start + _CHUNK_DOCUMENTS]
        size = int(part.sum())
        yield tokens[position : position + size], part
        position += size


def _base(settings: Settings, index: int) -> str:
    return os.path.join(settings.work_folder, f"{index:06d}")


def _file_crc32(path: str) -> int:
    crc32 = 0
    with open(path, "rb") as stream:
        while block := stream.read(_CHUNK_BYTES):
            crc32 = zlib.crc32(block, crc32)
    return crc32
