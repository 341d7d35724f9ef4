"""Text that is tokenized while it is read: a source whose tokens are made, chunk by chunk, when they are asked for."""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq

from megastage.data.packed_memmap import token_dtype
from megastage.data.sources import text
from megastage.data.sources.base import IGNORED, SourceError, SourceOptions, TokenSource
from megastage.data.sources.cache import cache_folder
from megastage.data.sources.chunks import FIRST, Chunk, ChunkStart, TextChunks, chunk_characters
from megastage.data.sources.columnar import encoded_bytes
from megastage.data.sources.parts import FlatPart, Part, part_ends
from megastage.data.streams import MAX_STREAMS

K = TypeVar("K")

_OPEN_CHUNKS = 96  # mapped at a time: one for each stream, and some that are made ahead
_PACKED_RATIO = 3  # of compressed text, for estimates


class LiveText(TokenSource):
    """Documents as in `TokenSource`, at the same positions as if all text had been tokenized, of which few are known.

    A position can be read once its chunk has been opened, by `chunk`. n_tokens: an estimate, equal on every rank;
    streams: how many virtual streams the documents feed.
    """

    def __init__(self, path: str, files: list[Path], tokenizer: Any, options: SourceOptions) -> None:
        """Makes the first chunk, or as many as hold a document for every stream."""
        self.path, self._local, self.dataset_type, self.kind = path, path, "huggingface", "documents"
        self.eos_id, self.vocab_size, self.tokenizer_hash = tokenizer.eos_id, tokenizer.vocab_size, tokenizer.sha256
        self.dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
        self.has_labels = self.has_loss_mask = False
        self.n_documents, self.flat_parts = None, None
        identity = f"{tokenizer.sha256} {tokenizer.eos_id} {options.text_field} {chunk_characters(files)}"
        self._identity = text.page_key(files) + identity.encode()
        times = [f"{file.name} {(facts := file.stat()).st_mtime_ns} {facts.st_ctime_ns}\n" for file in files]
        key = hashlib.blake2b(self._identity + "".join(times).encode(), digest_size=16).hexdigest()
        self._looks_ahead = options.may_build
        self._chunks = TextChunks(files, cache_folder(options) / f"live-{key}", tokenizer, options)
        self._lock = threading.Lock()
        self._opened: OrderedDict[int, Chunk] = OrderedDict()
        self._known, self._bases = [FIRST], [0]  # starts of chunks, and their first tokens, by position
        self._reached = FIRST  # by `reach`, without a gap
        self._first_crc32 = self.chunk(FIRST).crc32
        self.streams, self.n_tokens = self._survey(files)

    def _survey(self, files: list[Path]) -> tuple[int, int]:
        """The number of streams, and about how many tokens there are."""
        start: ChunkStart | None = FIRST
        documents = tokens = characters = 0
        while start is not None and documents < MAX_STREAMS:
            chunk = self.chunk(start)
            documents += len(chunk.documents[0])
            tokens, characters = tokens + chunk.tokens.size, characters + chunk.characters
            start = chunk.next
        if documents == 0:
            raise SourceError(f"{self.path}: its text gives no tokens")
        streams = min(MAX_STREAMS, 1 << (documents.bit_length() - 1))
        return streams, tokens if start is None else int(_characters(files) * tokens / characters)

    def chunk(self, start: ChunkStart, *, ahead: bool = False) -> Chunk:
        """The chunk that begins at `start`, from now on readable. ahead: have the next ones made in the background.

        Raises SourceError naming file and line where its text is bad, or where the text has changed.
        """
        with self._lock:
            chunk = self._opened.get(start.number)
            if chunk is not None and chunk.start == start:
                self._opened.move_to_end(start.number)
                return chunk
        try:
            chunk = self._chunks.open(start, ahead=ahead and self._looks_ahead)
        except OSError as error:
            raise SourceError(f"{self.path}: cannot be read or kept in the cache ({error})") from error
        except SourceError as error:
            raise SourceError(str(error).replace(self._local, self.path)) from None
        with self._lock:
            for known in (chunk.start, chunk.next):
                if known is not None:
                    self._learn(known)
            self._opened[start.number] = chunk
            while len(self._opened) > _OPEN_CHUNKS:
                self._opened.popitem(last=False)
        return chunk

    def _learn(self, start: ChunkStart) -> None:
        at = bisect_right(self._bases, start.token)
        if self._known[at - 1].number == start.number:
            if self._known[at - 1] != start:
                raise SourceError(f"{self.path}: its text has changed while it was read, near {start}")
            return
        self._known.insert(at, start)
        self._bases.insert(at, start.token)

    def _holding(self, position: int) -> Chunk:
        """The chunk that holds a token of the stream, which must have been opened before."""
        with self._lock:
            start = self._known[bisect_right(self._bases, position) - 1]
        chunk = self.chunk(start)
        if not start.token <= position < start.token + chunk.tokens.size:
            raise IndexError(f"{self.path}: token {position} lies in no chunk that was opened")
        return chunk

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), which must not reach beyond `readable_to(start)`."""
        chunk = self._holding(start)
        return chunk.tokens[start - chunk.start.token : stop - chunk.start.token]

    def readable_to(self, start: int) -> int:
        """The end of the chunk, where a document ends too."""
        chunk = self._holding(start)
        return chunk.start.token + chunk.tokens.size

    def document_ends(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `TokenSource.document_ends`; each range within one chunk."""
        counts, found = [0], [np.empty(0, np.int64)]
        for start, stop in zip(starts.tolist(), stops.tolist()):
            chunk = self._holding(start)
            base = chunk.start.token
            part = Part(chunk.tokens, doc_ends=chunk.doc_ends)
            _, ends = part_ends(part, np.array([start - base]), np.array([stop - base]), None)
            counts.append(len(ends))
            found.append(ends + base)
        return np.cumsum(counts), np.concatenate(found)

    def end_units(self, stops: np.ndarray) -> np.ndarray:
        """See `TokenSource.end_units`."""
        offsets, ends = self.document_ends(stops - 1, stops)
        ended = np.diff(offsets) > 0
        assert not ended.any() or (ends[offsets[1:][ended] - 1] == stops[ended]).all()
        return ended

    def flat_at(self, starts: np.ndarray, lengths: np.ndarray) -> list[FlatPart] | None:
        """See `TokenSource.flat_at`: the chunks."""
        with self._lock:
            bases = np.array(self._bases)
        touched = np.unique(bases[np.searchsorted(bases, starts, "right") - 1])
        flat = []
        for base in touched.tolist():
            chunk = self._holding(base)
            tokens, ends = chunk.tokens.view(), chunk.doc_ends.view()
            for values in (tokens, ends):
                values.flags.writeable = False
            flat.append(FlatPart(tokens, ends, base, IGNORED))
        return flat

    @property
    def flat_dtype(self) -> np.dtype[Any] | None:
        """See `TokenSource.flat_dtype`."""
        return self.dtype

    def reach(self, n_tokens: int | None) -> int:
        """See `TokenSource.reach`: opens one chunk after the other."""
        while True:
            chunk = self.chunk(self._reached)
            end = chunk.start.token + chunk.tokens.size
            if chunk.next is None or (n_tokens is not None and end >= n_tokens):
                return end
            self._reached = chunk.next

    def units_within(self, start: int, stop: int) -> np.ndarray:
        """See `TokenSource.units_within`."""
        found = [np.empty(0, np.int64)]
        while start < stop:
            chunk = self._holding(start)
            ends = chunk.doc_ends + chunk.start.token
            found.append(ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, stop)])
            start = chunk.start.token + chunk.tokens.size
        return np.concatenate(found)

    @cached_property
    def fingerprint(self) -> bytes:
        """blake2b (32 bytes) of sizes, sampled pages, tokenizer and the first chunk's tokens; no path, no times."""
        digest = hashlib.blake2b(self._identity, digest_size=32, person=b"megastage text")
        digest.update(self._first_crc32.to_bytes(4, "little"))
        return digest.digest()

    def close(self) -> None:
        """Stop making chunks ahead."""
        self._chunks.close()


def shared(opened: Mapping[K, TokenSource]) -> dict[K, TokenSource]:
    """The sources, with one `LiveText` for all paths of one text: what the order has opened, all can read then."""
    first: dict[bytes, TokenSource] = {}
    return {
        key: first.setdefault(source.fingerprint, source) if isinstance(source, LiveText) else source
        for key, source in opened.items()
    }


def _characters(files: list[Path]) -> int:
    """About how many characters of text the files hold."""
    total = 0
    ratios: dict[str, float] = {}
    for file in files:
        kind = file.suffix.lower()
        if kind not in ratios:
            ratios[kind] = _PACKED_RATIO if kind in (".gz", ".zst") else 1
            if kind == ".parquet":
                ratios[kind] = encoded_bytes(pq.read_metadata(file)) / file.stat().st_size
        total += int(file.stat().st_size * ratios[kind])
    return total
