"""Any tokenized data set as one stream of tokens with document ends, for inspect, verify, convert and merge."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megastage.data import packed_memmap
from megastage.data.packed_memmap import METADATA, TOKENIZER, PackedMemmapWriter, TokenizerFacts, open_packed_memmap

from . import megatron
from .nanoset import UNKNOWN, NanosetWriter

Writer = PackedMemmapWriter | NanosetWriter | megatron.MegatronWriter
WRITERS: dict[str, type[Writer]] = {
    "packed_memmap": PackedMemmapWriter,
    "nanoset": NanosetWriter,
    "megatron": megatron.MegatronWriter,
}
_CHUNK_DOCUMENTS = 1 << 14


class DataError(ValueError):
    """A data set that cannot be read; the message names the file, the value and the way out."""


@dataclass(frozen=True)
class Segment:
    """One file's tokens, and its document ends counted from the start of that file."""

    file: str
    tokens: np.ndarray
    doc_ends: np.ndarray


@dataclass(frozen=True)
class TokenData:
    """A data set of any format. `eos_id` is None when documents end in different tokens."""

    path: str
    kind: str
    dtype: str
    segments: tuple[Segment, ...]
    eos_id: int | None
    tokenizer: TokenizerFacts | None
    tokenizer_json: Path | None

    @property
    def n_tokens(self) -> int:
        return sum(segment.tokens.size for segment in self.segments)

    @property
    def n_documents(self) -> int:
        return sum(segment.doc_ends.size for segment in self.segments)

    def lengths(self) -> np.ndarray:
        """Tokens of every document, int64[n_documents]."""
        return np.concatenate([np.diff(s.doc_ends.astype(np.int64), prepend=0) for s in self.segments])

    def document(self, index: int) -> np.ndarray:
        """Tokens of document `index` over all files."""
        for segment in self.segments:
            if index < segment.doc_ends.size:
                start = int(segment.doc_ends[index - 1]) if index else 0
                return segment.tokens[start : int(segment.doc_ends[index])]
            index -= segment.doc_ends.size
        raise IndexError(index)

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Everything in bounded steps: (tokens, lengths of the documents they make up)."""
        for segment in self.segments:
            for start in range(0, segment.doc_ends.size, _CHUNK_DOCUMENTS):
                ends = segment.doc_ends[start : start + _CHUNK_DOCUMENTS].astype(np.int64)
                first = int(segment.doc_ends[start - 1]) if start else 0
                yield segment.tokens[first : int(ends[-1])], np.diff(ends, prepend=first)


def open_data(path: str) -> TokenData:
    """Open a packed_memmap or nanoset folder, or a megatron prefix. Raises ValueError naming the file."""
    folder = Path(path)
    if folder.is_dir():
        if (folder / METADATA).exists():
            return _packed(path)
        if any(folder.glob("*.ds")):
            return _nanoset(path)
        raise DataError(f"{path}: neither a complete packed_memmap folder (no {METADATA}) nor a nanoset (no *.ds)")
    if any(os.path.exists(f"{megatron.prefix_of(path)}.{suffix}") for suffix in ("bin", "idx")):
        return _megatron(path)
    raise DataError(f"{path}: no such folder, and no megatron {megatron.prefix_of(path)}.bin and .idx")


def _packed(path: str) -> TokenData:
    data = open_packed_memmap(path)
    segment = Segment(os.path.join(path, packed_memmap.TOKENS), data.tokens, data.doc_ends)
    facts = data.metadata
    return TokenData(path, "packed_memmap", facts.dtype, (segment,), facts.eos_id, facts.tokenizer, _copy(path))


def _copy(path: str) -> Path | None:
    file = Path(path) / TOKENIZER
    return file if file.is_file() else None


def _nanoset(path: str) -> TokenData:
    segments, facts = [], set()
    for file in sorted(Path(path).glob("*.ds")):
        if Path(f"{file}.loss").exists():
            raise DataError(f"{file}.loss: loss masks would be lost here; train from the nanoset as it is")
        segment, name, width = _nanoset_file(file)
        segments.append(segment)
        facts.add((name, width))
    if len(facts) > 1:
        raise DataError(f"{path}: files of different tokenizers or widths ({sorted(facts)}); give each its own folder")
    name, width = facts.pop()
    tokenizer = None if name == UNKNOWN else TokenizerFacts(name, None, None)
    dtype = "uint16" if width == 2 else "uint32"
    return TokenData(path, "nanoset", dtype, tuple(segments), common_end(segments), tokenizer, _copy(path))


def _nanoset_file(file: Path) -> tuple[Segment, str, int]:
    metadata, index = Path(f"{file}.metadata"), Path(f"{file}.index")
    for needed in (metadata, index):
        if not needed.is_file():
            raise DataError(f"{needed}: missing, so {file.name} is not a complete nanoset file; tokenize it again")
    try:
        lines = metadata.read_text(encoding="utf-8").split("\n")
        name, _, size = lines[0].rpartition("|")
        width, count = int(size), int(lines[1])
    except (ValueError, IndexError):
        raise DataError(f"{metadata}: expected `tokenizer|2` or `tokenizer|4`, then the token count") from None
    if width not in (2, 4):
        raise DataError(f"{metadata}: token size {width}, expected 2 or 4")
    size_bytes = file.stat().st_size
    if size_bytes != count * width or not count:
        raise DataError(f"{file}: {size_bytes} bytes, but its metadata records {count} tokens of {width} bytes")
    if index.stat().st_size % 8 or not index.stat().st_size:
        raise DataError(f"{index}: {index.stat().st_size} bytes are no list of uint64 document ends; restore it")
    ends = np.memmap(index, dtype="<u8", mode="r").view(np.ndarray)
    if int(ends[-1]) != count or bool((ends[1:] < ends[:-1]).any()):
        raise DataError(f"{index}: its ends do not rise to the {count} tokens of {file.name}; restore it")
    tokens = np.memmap(file, dtype=f"<u{width}", mode="r").view(np.ndarray)
    return Segment(str(file), tokens, ends), name or UNKNOWN, width


def _megatron(path: str) -> TokenData:
    tokens, ends = megatron.read_index(path)
    segment = Segment(f"{megatron.prefix_of(path)}.bin", tokens, ends)
    highest = max(int(tokens[i : i + (1 << 22)].max()) for i in range(0, tokens.size, 1 << 22))
    narrow = tokens.dtype.itemsize <= 2 or (tokens.dtype.itemsize == 8 and highest < 1 << 16)
    dtype = "uint16" if narrow else "uint32"
    return TokenData(path, "megatron", dtype, (segment,), common_end([segment]), None, None)


def common_end(segments: list[Segment]) -> int | None:
    """The token that ends every document, None when they differ or one document is all there is."""
    found: int | None = None
    if sum(segment.doc_ends.size for segment in segments) < 2:
        return None
    for segment in segments:
        for start in range(0, segment.doc_ends.size, 1 << 20):
            ends = segment.doc_ends[start : start + (1 << 20)]
            # Empty documents have no last token; the end before them is looked at anyway.
            last = segment.tokens[ends[ends > 0].astype(np.int64) - 1]
            for token in np.unique(last):
                if found is not None and found != int(token):
                    return None
                found = int(token)
    return found


def copy_documents(sources: list[TokenData], writer: Writer, progress: Callable[[int], None]) -> None:
    """Write all documents of all sources in order, and finish the writer; on any error nothing is left behind."""
    try:
        for source in sources:
            for tokens, lengths in source.documents():
                writer.extend(tokens, lengths)
                progress(tokens.nbytes)
        writer.finish()
    except BaseException:
        writer.abort()
        raise
