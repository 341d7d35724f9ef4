"""The `packed_memmap` on-disk format: tokens once, a document index, page checksums and metadata.

A folder with four files, described byte by byte in docs/data-formats.md:

    tokens.bin      little-endian uint16 or uint32, no header
    documents.bin   little-endian uint64 cumulative document ends in tokens, no leading 0
    pages.crc32     little-endian uint32, the CRC-32 of each page (`page_bytes`) of tokens.bin
    metadata.json   written last; without it the folder is not a data set

and, when it is known, tokenizer.json: a copy of the tokenizer for those who decode.

The folder is staged beside its target and renamed into place, so it appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megastage.data.durable import StagedFolder, close_discarded, fsync_path, write_atomically
from megastage.data.mapping import map_file
from megastage.data.page_checksums import PageChecksums

FORMAT = "megastage.packed_memmap"
VERSION = 1
PAGE_BYTES = 1 << 20
TOKENS, DOCUMENTS, PAGES, METADATA = "tokens.bin", "documents.bin", "pages.crc32", "metadata.json"
TOKENIZER = "tokenizer.json"
FILES = (TOKENS, DOCUMENTS, PAGES, METADATA, TOKENIZER)

_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_METADATA_LIMIT_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 24
_CHUNK_TOKENS = 1 << 22
_FIELDS = ("dtype", "n_tokens", "n_documents", "eos_id", "page_bytes", "documents_crc32", "pages_crc32", "tokenizer")


class PackedMemmapError(ValueError):
    """A folder that is not a sound packed_memmap data set; the message names the file, the value and the way out."""


@dataclass(frozen=True)
class TokenizerFacts:
    """What is recorded of the tokenizer that made the tokens; `sha256` is over its canonical content.

    `sha256` and `vocab_size` are None for tokens converted from a format that records only a name.
    """

    name: str
    sha256: str | None
    vocab_size: int | None

    @property
    def id_limit(self) -> int:
        """One more than the largest id that may occur; 2^32 where the vocabulary is unknown."""
        return 1 << 32 if self.vocab_size is None else self.vocab_size


@dataclass(frozen=True)
class PackedMemmapMetadata:
    """The content of metadata.json. `eos_id` is the id that ends every document, None if none was appended."""

    dtype: str
    n_tokens: int
    n_documents: int
    eos_id: int | None
    page_bytes: int
    documents_crc32: int
    pages_crc32: int
    tokenizer: TokenizerFacts | None

    def to_json(self) -> bytes:
        """The bytes of metadata.json: format, version, the fields and a CRC-32 over all of them."""
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION, **asdict(self)}
        content["crc32"] = _content_crc32(content)
        return (json.dumps(content, indent=2, ensure_ascii=True) + "\n").encode("ascii")


@dataclass(frozen=True)
class PackedMemmap:
    """An open data set: `tokens` uint16/uint32[n_tokens] and `doc_ends` uint64[n_documents], both read-only maps."""

    path: Path
    tokens: np.ndarray
    doc_ends: np.ndarray
    page_crc32: np.ndarray
    metadata: PackedMemmapMetadata

    def document(self, index: int) -> np.ndarray:
        """Tokens of document `index` (0-based), a view of the map."""
        start = int(self.doc_ends[index - 1]) if index > 0 else 0
        return self.tokens[start : int(self.doc_ends[index])]


def token_dtype(vocab_size: int) -> str:
    """The narrowest dtype that holds ids 0 .. vocab_size - 1."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def token_bytes(tokens: np.ndarray, dtype: np.dtype[Any], limit: int) -> Iterator[bytes]:
    """Tokens as bytes of `dtype`, some MB at a time. Raises ValueError for an id outside 0 .. limit - 1."""
    for start in range(0, tokens.size, _CHUNK_TOKENS):
        part = tokens[start : start + _CHUNK_TOKENS]
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= limit:
            outside = f"token {low if low < 0 else high} is outside 0 .. {limit - 1} (dtype {dtype.name}, vocabulary)"
            raise ValueError(f"{outside}; choose uint32 or the tokenizer that made the tokens")
        yield np.ascontiguousarray(part, dtype=dtype).tobytes()


class PackedMemmapWriter:
    """Streams documents into a new packed_memmap folder; page checksums are computed on the way.

    Use as a context manager: leaving it normally calls `finish`, an exception discards what was written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        dtype: str,
        *,
        eos_id: int | None = None,
        tokenizer: TokenizerFacts | None = None,
        tokenizer_json: bytes | None = None,
        page_bytes: int = PAGE_BYTES,
        overwrite: bool = False,
    ) -> None:
        """Raises ValueError for a dtype other than uint16/uint32, a bad page size, or a folder that exists."""
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r}: packed_memmap holds 'uint16' or 'uint32'")
        if page_bytes <= 0 or page_bytes % 4:
            raise ValueError(f"page_bytes {page_bytes}: must be a positive multiple of 4")
        self._limit = min(1 << (8 * _DTYPES[dtype].itemsize), tokenizer.id_limit if tokenizer else 1 << 32)
        if eos_id is not None and not 0 <= eos_id < self._limit:
            raise ValueError(f"eos_id {eos_id}: outside 0 .. {self._limit - 1} (dtype {dtype} and the vocabulary)")
        self._dtype, self._eos_id, self._tokenizer, self._page_bytes = dtype, eos_id, tokenizer, page_bytes
        self.n_tokens = 0
        self.n_documents = 0
        self._documents_crc32 = 0
        self._pages = PageChecksums(page_bytes)
        self._staged = StagedFolder(folder, overwrite=overwrite, is_ours=is_ours)
        self.folder = self._staged.target
        if tokenizer_json is not None:
            write_atomically(self._staged.path / TOKENIZER, tokenizer_json)
        self._tokens_file: BinaryIO = open(self._staged.path / TOKENS, "wb", buffering=_CHUNK_BYTES)  # noqa: SIM115
        self._documents_file: BinaryIO = open(self._staged.path / DOCUMENTS, "wb", buffering=1 << 16)  # noqa: SIM115

    def append(self, tokens: np.ndarray | Sequence[int]) -> None:
        """Add one document. Raises ValueError when a token does not fit the dtype or the vocabulary."""
        array = np.asarray(tokens)
        self.extend(array, [len(array)])

    def extend(self, tokens: np.ndarray | Sequence[int], lengths: np.ndarray | Sequence[int]) -> None:
        """Add several documents: their tokens end to end, and the length of each in tokens."""
        array, sizes = np.asarray(tokens), np.asarray(lengths, dtype=np.int64)
        if array.ndim != 1 or (sizes.size and sizes.min() < 0) or int(sizes.sum()) != array.size:
            raise ValueError(f"document lengths sum to {int(sizes.sum())}, but {array.size} tokens were given")
        if array.dtype.kind not in "iu" and array.size:
            raise ValueError(f"tokens must be integers, not {array.dtype}")
        for content in token_bytes(array, _DTYPES[self._dtype], self._limit):
            self._tokens_file.write(content)
            self._pages.update(content)
        ends = (self.n_tokens + np.cumsum(sizes)).astype("<u8").tobytes()
        self._documents_file.write(ends)
        self._documents_crc32 = zlib.crc32(ends, self._documents_crc32)
        self.n_tokens += array.size
        self.n_documents += sizes.size

    def finish(self) -> PackedMemmapMetadata:
        """Sync everything, write metadata.json and rename the folder into place."""
        if not self.n_tokens:
            self.abort()
            raise ValueError(f"{self.folder}: no tokens were written, and an empty data set is of no use")
        for file in (self._tokens_file, self._documents_file):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        pages = self._pages.finish()
        (self._staged.path / PAGES).write_bytes(pages)
        fsync_path(self._staged.path / PAGES)
        metadata = PackedMemmapMetadata(
            dtype=self._dtype,
            n_tokens=self.n_tokens,
            n_documents=self.n_documents,
            eos_id=self._eos_id,
            page_bytes=self._page_bytes,
            documents_crc32=self._documents_crc32,
            pages_crc32=zlib.crc32(pages),
            tokenizer=self._tokenizer,
        )
        write_atomically(self._staged.path / METADATA, metadata.to_json())
        self._staged.commit()
        return metadata

    def abort(self) -> None:
        """Drop what was written; an earlier data set of that name is untouched."""
        close_discarded(self._tokens_file, self._documents_file)
        self._staged.discard()

    def __enter__(self) -> PackedMemmapWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.finish()
        except BaseException:
            self.abort()
            raise


def is_ours(name: str) -> bool:
    """Whether a file name belongs to a packed_memmap folder (other files keep it from being overwritten)."""
    return name in FILES


def read_metadata(folder: str | os.PathLike[str]) -> PackedMemmapMetadata:
    """Read and check metadata.json alone. Raises PackedMemmapError."""
    path = Path(folder)
    if not path.is_dir():
        raise PackedMemmapError(f"{path}: no such folder")
    file = path / METADATA
    if not file.is_file():
        raise PackedMemmapError(
            f"{file}: missing, so this is no complete packed_memmap folder (it is written last); preprocess it again"
        )
    if file.stat().st_size > _METADATA_LIMIT_BYTES:
        raise PackedMemmapError(f"{file}: {file.stat().st_size} bytes, too large to be packed_memmap metadata")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PackedMemmapError(f"{file}: not readable as JSON ({error}); restore it or preprocess again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise PackedMemmapError(f"{file}: format is {found!r}, not {FORMAT!r}; is this another kind of data set?")
    if content.get("version") != VERSION:
        raise PackedMemmapError(
            f"{file}: version {content.get('version')!r}, this program reads version {VERSION}; preprocess again"
        )
    return _parse_metadata(file, content)


def _parse_metadata(file: Path, content: dict[str, Any]) -> PackedMemmapMetadata:
    missing = [name for name in (*_FIELDS, "crc32") if name not in content]
    if missing:
        raise PackedMemmapError(f"{file}: lacks {', '.join(missing)}; restore it or preprocess again")
    recorded = content.pop("crc32")
    if recorded != _content_crc32(content):
        raise PackedMemmapError(f"{file}: its content does not match its crc32 {recorded!r}; it was damaged or edited")
    if content["dtype"] not in _DTYPES:
        raise PackedMemmapError(f"{file}: dtype {content['dtype']!r}, expected 'uint16' or 'uint32'")
    for name in ("n_tokens", "n_documents", "page_bytes", "documents_crc32", "pages_crc32"):
        least = 0 if name.endswith("crc32") else 1
        if type(content[name]) is not int or not least <= content[name] < 1 << 63:
            raise PackedMemmapError(f"{file}: {name} is {content[name]!r}, expected an integer of at least {least}")
    if content["page_bytes"] % 4:
        raise PackedMemmapError(f"{file}: page_bytes is {content['page_bytes']}, expected a multiple of 4")
    eos_id, tokenizer = content["eos_id"], content["tokenizer"]
    if eos_id is not None and (
        type(eos_id) is not int or not 0 <= eos_id < 1 << 8 * _DTYPES[content["dtype"]].itemsize
    ):
        raise PackedMemmapError(f"{file}: eos_id is {eos_id!r}, expected null or a token id of {content['dtype']}")
    facts = None if tokenizer is None else _parse_tokenizer(file, tokenizer)
    return PackedMemmapMetadata(**{name: content[name] for name in _FIELDS if name != "tokenizer"}, tokenizer=facts)


def _parse_tokenizer(file: Path, content: Any) -> TokenizerFacts:
    try:
        facts = TokenizerFacts(**content)
    except TypeError:
        raise PackedMemmapError(f"{file}: tokenizer is {content!r}, expected name, sha256, vocab_size") from None
    if not isinstance(facts.name, str):
        raise PackedMemmapError(f"{file}: tokenizer.name is {facts.name!r}, expected a string")
    if facts.vocab_size is not None and (type(facts.vocab_size) is not int or facts.vocab_size < 1):
        raise PackedMemmapError(f"{file}: tokenizer.vocab_size is {facts.vocab_size!r}, expected null or at least 1")
    if facts.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", str(facts.sha256)):
        raise PackedMemmapError(f"{file}: tokenizer.sha256 is {facts.sha256!r}, expected null or 64 hexadecimal digits")
    return facts


def open_packed_memmap(folder: str | os.PathLike[str], *, check_index: bool = True) -> PackedMemmap:
    """Open a folder, checking the size of every file and, with `check_index`, the whole document index.

    The tokens are not read: `verify` does that. Raises PackedMemmapError naming the file.
    """
    path = Path(folder)
    metadata = read_metadata(path)
    dtype = _DTYPES[metadata.dtype]
    token_bytes = metadata.n_tokens * dtype.itemsize
    n_pages = -(-token_bytes // metadata.page_bytes)
    tokens = _map(path / TOKENS, dtype, metadata.n_tokens, "n_tokens")
    doc_ends = _map(path / DOCUMENTS, np.dtype("<u8"), metadata.n_documents, "n_documents")
    pages = _map(path / PAGES, np.dtype("<u4"), n_pages, "pages")
    crc32 = zlib.crc32(pages.data)
    if crc32 != metadata.pages_crc32:
        raise PackedMemmapError(_damaged(path / PAGES, crc32, metadata.pages_crc32))
    if check_index:
        _check_index(path / DOCUMENTS, doc_ends, metadata)
    return PackedMemmap(path, tokens, doc_ends, pages, metadata)


def _map(file: Path, dtype: np.dtype, count: int, what: str) -> np.ndarray:
    """A read-only map of `count` items; a missing file or another size is an error."""
    try:
        size = os.stat(file).st_size
    except FileNotFoundError:
        raise PackedMemmapError(f"{file}: missing; restore it or preprocess again") from None
    if size != count * dtype.itemsize:
        kind = "truncated" if size < count * dtype.itemsize else "longer than recorded"
        raise PackedMemmapError(
            f"{file}: {size} bytes, but {METADATA} records {count} {what} of {dtype.itemsize} bytes = "
            f"{count * dtype.itemsize}: {kind}; restore it or preprocess again"
        )
    return map_file(file, dtype, count)


def _damaged(file: Path, found: int, recorded: int) -> str:
    return f"{file}: CRC-32 {found:#010x}, recorded {recorded:#010x}: damaged; restore it or preprocess again"


def _check_index(file: Path, doc_ends: np.ndarray, metadata: PackedMemmapMetadata) -> None:
    """Checksum and order of the document ends, a chunk at a time."""
    crc32, last, chunk = 0, 0, _CHUNK_BYTES // 8
    for start in range(0, doc_ends.size, chunk):
        part = doc_ends[start : start + chunk]
        crc32 = zlib.crc32(part.data, crc32)
        bad = np.flatnonzero(part < np.concatenate([np.array([last], dtype="<u8"), part[:-1]]))
        if bad.size:
            where = start + int(bad[0])
            raise PackedMemmapError(
                f"{file}: end {where} is {int(doc_ends[where])}, before the end of the document in front of it; "
                "the file is damaged, restore it or preprocess again"
            )
        last = int(part[-1])
    if last != metadata.n_tokens:
        raise PackedMemmapError(f"{file}: the last end is {last}, but {METADATA} records {metadata.n_tokens} tokens")
    if crc32 != metadata.documents_crc32:
        raise PackedMemmapError(_damaged(file, crc32, metadata.documents_crc32))


def verify(folder: str | os.PathLike[str], progress: Callable[[int], None] | None = None) -> PackedMemmap:
    """Read everything and check every checksum and every token id; returns the open data set.

    `progress` is called with the bytes checked since the last call. Raises PackedMemmapError naming the first bad page.
    """
    data = open_packed_memmap(folder)
    metadata, file = data.metadata, data.path / TOKENS
    per_page = metadata.page_bytes // data.tokens.itemsize
    limit = metadata.tokenizer.id_limit if metadata.tokenizer else 1 << 32
    for page in range(data.page_crc32.size):
        part = data.tokens[page * per_page : (page + 1) * per_page]
        crc32 = zlib.crc32(part.data)
        if crc32 != int(data.page_crc32[page]):
            raise PackedMemmapError(
                f"{file}: page {page} (tokens {page * per_page} to {page * per_page + part.size}) has CRC-32 "
                f"{crc32:#010x}, recorded {int(data.page_crc32[page]):#010x}: damaged; restore it or preprocess again"
            )
        if int(part.max()) >= limit:
            raise PackedMemmapError(
                f"{file}: page {page} holds token {int(part.max())}, but the vocabulary has {limit} entries; "
                "preprocess again with the right tokenizer"
            )
        if progress is not None:
            progress(part.nbytes)
    return data


def _content_crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii"))
