"""Any tokenized data set as one stream of tokens with document ends, for inspect, verify, convert and merge."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megastage.data import packed_memmap
from megastage.data.packed_memmap import METADATA, TOKENIZER, PackedMemmapWriter, TokenizerFacts
from megastage.data.sources.base import TokenSource, open_source
from megastage.data.sources.nanoset import read_metadata
from megastage.data.tokenizer import Tokenizer

from . import megatron
from .nanoset import UNKNOWN, NanosetWriter

Writer = PackedMemmapWriter | NanosetWriter | megatron.MegatronWriter
WRITERS: dict[str, type[Writer]] = {
    "packed_memmap": PackedMemmapWriter,
    "nanoset": NanosetWriter,
    "megatron": megatron.MegatronWriter,
}
# Taken at a time; a longer document comes alone.
_CHUNK_DOCUMENTS, _CHUNK_TOKENS = 1 << 14, 1 << 24


class DataError(ValueError):
    """A data set that cannot be read; the message names the file, the value and the way out."""


@dataclass(frozen=True)
class TokenData:
    """A data set of any format: what the trainer reads of it, and what is recorded beside.

    files: its token files; eos_id: None when documents end in different tokens; losses: what no other format keeps.
    """

    path: str
    kind: str
    dtype: str
    source: TokenSource
    files: tuple[str, ...]
    eos_id: int | None
    tokenizer: TokenizerFacts | None
    tokenizer_json: Path | None
    losses: tuple[str, ...] = ()

    @property
    def n_tokens(self) -> int:
        return self.source.n_tokens

    @property
    def n_documents(self) -> int:
        return self.source.doc_ends.size

    @property
    def token_bytes(self) -> int:
        """Size of the tokens on the disk."""
        return self.source.n_tokens * self.source.dtype.itemsize

    def lengths(self) -> np.ndarray:
        """Tokens of every document, int64[n_documents]."""
        return np.diff(self.source.doc_ends.astype(np.int64), prepend=0)

    def document(self, index: int) -> np.ndarray:
        """Tokens of document `index` over all files."""
        ends = self.source.doc_ends
        return self.source.read(int(ends[index - 1]) if index else 0, int(ends[index]))

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Everything in bounded steps: (tokens, lengths of the documents they make up)."""
        yield from _documents(self.source)


def open_data(path: str) -> TokenData:
    """Open a packed_memmap or nanoset folder, a megatron prefix or folder. Raises ValueError naming the file."""
    folder = Path(path)
    if folder.is_dir():
        if (folder / METADATA).exists():
            return _packed(path)
        if any(folder.glob("*.ds")):
            return _nanoset(path)
        if any(folder.glob("*.idx")):
            return _megatron(path, sorted(folder.glob("*.idx")))
        raise DataError(
            f"{path}: neither a complete packed_memmap folder (no {METADATA}) nor a nanoset (no *.ds) nor megatron "
            "(no *.idx)"
        )
    if any(os.path.exists(f"{megatron.prefix_of(path)}.{suffix}") for suffix in ("bin", "idx")):
        return _megatron(path, [Path(f"{megatron.prefix_of(path)}.idx")])
    raise DataError(f"{path}: no such folder, and no megatron {megatron.prefix_of(path)}.bin and .idx")


def _packed(path: str) -> TokenData:
    source, facts = open_source("packed_memmap", path), packed_memmap.read_metadata(path)
    files = (os.path.join(path, packed_memmap.TOKENS),)
    return TokenData(path, "packed_memmap", facts.dtype, source, files, facts.eos_id, facts.tokenizer, _copy(path))


def _copy(path: str) -> Path | None:
    file = Path(path) / TOKENIZER
    return file if file.is_file() else None


def _nanoset(path: str) -> TokenData:
    files = sorted(Path(path).glob("*.ds"))
    for file in files:
        if Path(f"{file}.loss").exists():
            raise DataError(f"{file}.loss: loss masks would be lost here; train from the nanoset as it is")
        if not Path(f"{file}.index").is_file():
            raise DataError(f"{file}.index: missing, so its documents are not known; tokenize {file.name} again")
    source = open_source("nanoset", path)
    name, width, _ = read_metadata(files[0])
    tokenizer = None if name in ("", UNKNOWN) else TokenizerFacts(name, None, None)
    dtype = "uint16" if width == 2 else "uint32"
    names = tuple(str(file) for file in files)
    return TokenData(path, "nanoset", dtype, source, names, common_end(source), tokenizer, _copy(path))


def _megatron(path: str, indexes: list[Path]) -> TokenData:
    source = open_source("megatron", megatron.prefix_of(path))
    steps = range(0, source.n_tokens, 1 << 22)
    highest = max(int(source.read(i, min(i + (1 << 22), source.n_tokens)).max()) for i in steps)
    width = source.dtype.itemsize
    dtype = "uint16" if width <= 2 or (width == 8 and highest < 1 << 16) else "uint32"
    files = tuple(str(index.with_suffix(".bin")) for index in indexes)
    losses = tuple(loss for index in indexes for loss in megatron.losses(index, dtype))
    return TokenData(path, "megatron", dtype, source, files, common_end(source), None, None, losses)


def _documents(source: TokenSource) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    all_ends = source.doc_ends
    first = start = 0
    while start < all_ends.size:
        fit = int(np.searchsorted(all_ends, np.array(first + _CHUNK_TOKENS, all_ends.dtype), "right"))
        stop = min(start + _CHUNK_DOCUMENTS, max(start + 1, fit))
        ends = all_ends[start:stop].astype(np.int64)
        yield source.read(first, int(ends[-1])), np.diff(ends, prepend=first)
        first, start = int(ends[-1]), stop


def check_pages(data: TokenData, progress: Callable[[int], None] | None = None) -> None:
    """Check the tokens against their checksums, where the format has any. Raises ValueError naming the bad page."""
    if data.kind == "packed_memmap":
        packed_memmap.verify(data.path, progress)


def check_tokenizer(data: TokenData, tokenizer: Tokenizer, file: str | os.PathLike[str]) -> None:
    """Raise DataError when the data set records another tokenizer than that of `file`."""
    recorded = data.tokenizer.sha256 if data.tokenizer else None
    if recorded not in (None, tokenizer.sha256):
        raise DataError(f"{file}: sha256 {tokenizer.sha256}, but {data.path} records {recorded}; give that tokenizer")


def common_end(source: TokenSource) -> int | None:
    """The token that ends every document, None when they differ or one document is all there is."""
    found: int | None = None
    if source.doc_ends.size < 2:
        return None
    for tokens, lengths in _documents(source):
        # Empty documents have no last token.
        for token in np.unique(tokens[np.cumsum(lengths)[lengths > 0] - 1]):
            if found is not None and found != int(token):
                return None
            found = int(token)
    return found


def copy_documents(sources: list[TokenData], writer: Writer, progress: Callable[[int], None]) -> None:
    """Write all documents of all sources in order, and finish the writer; on any error nothing is left behind.

    Checksums are checked first: the new ones would make damage look sound.
    """
    try:
        for source in sources:
            check_pages(source)
            for tokens, lengths in source.documents():
                writer.extend(tokens, lengths)
                progress(tokens.nbytes)
        writer.finish()
    except BaseException:
        writer.abort()
        raise
