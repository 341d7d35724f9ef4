"""What every data source offers: one stream of tokens over all its files, its documents, and a proof of its content.

A reader module (nanoset, packed_memmap, preprocessed, megatron, huggingface) has one function
`open_folder(path, options) -> TokenSource`. Readers check sizes, headers and document indexes, never all tokens.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megastage.data.mapping import map_file
from megastage.data.sources.parts import FlatPart, Part, hash_index, part_ends, slice_part

READERS = {
    "nanoset": "nanoset",
    "packed_memmap": "packed",
    "preprocessed": "preprocessed",
    "huggingface": "huggingface",
    "megatron": "megatron",
}
IGNORED = -100  # the label that the loss leaves out

_PAGE_TOKENS = 512
_PAGES = 64


class SourceError(ValueError):
    """A data set that cannot be read as it is; the message names the file, the value and the way out."""


@dataclass(frozen=True)
class SourceOptions:
    """What a reader may need beside the path.

    eos_id: the model tokenizer's end of document, for formats that record none.
    tokenizer: an object with encode_batch, vocab_size, eos_id, sha256, name (text sources only).
    cache_folder: where tokenized text is kept; may_build: whether this process may write it.
    live_bytes: size on disk above which local text is tokenized while it is read, not before; None: never.
    """

    eos_id: int | None = None
    tokenizer: Any = None
    cache_folder: Path | None = None
    text_field: str = "text"
    may_build: bool = True
    live_bytes: int | None = None


class TokenSource:
    """One data set as a stream of `n_tokens` tokens, in the order of its sorted files.

    kind: "stream" (windows anywhere) or "documents" (whole documents, `doc_ends`, are packed into rows).
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        path: str | os.PathLike[str],
        dataset_type: str,
        kind: str,
        eos_id: int | None = None,
        vocab_size: int | None = None,
        tokenizer_hash: str | None = None,
        recorded_hash: bytes = b"",
    ) -> None:
        """Raises SourceError when the parts differ in dtype or hold fewer than two tokens together."""
        self.path, self.dataset_type, self.kind = str(path), dataset_type, kind
        self.eos_id, self.vocab_size, self.tokenizer_hash = eos_id, vocab_size, tokenizer_hash
        self._parts = [part for part in parts if part.tokens.size]
        self._recorded_hash = recorded_hash
        dtypes = {part.tokens.dtype for part in self._parts}
        if len(dtypes) > 1:
            names = ", ".join(sorted(str(dtype) for dtype in dtypes))
            raise SourceError(f"{path}: its files hold tokens of different types ({names}); put each in its own folder")
        starts = np.zeros(len(self._parts) + 1, np.int64)
        np.cumsum([part.tokens.size for part in self._parts], out=starts[1:])
        self._starts, self._bounds = starts, starts.tolist()
        self.n_tokens = int(starts[-1])
        if self.n_tokens < 2:
            raise SourceError(f"{path}: holds {self.n_tokens} tokens; a source needs at least 2")
        self.dtype: np.dtype[Any] = dtypes.pop()
        self.has_labels = any(part.labels is not None for part in self._parts)
        self.has_loss_mask = any(part.loss_mask is not None for part in self._parts)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) in the stored dtype: a view, or a copy when the range spans files."""
        return self._gather("tokens", start, stop)

    def labels(self, start: int, stop: int) -> np.ndarray | None:
        """The data's own label of each input token in [start, stop), -100 = ignored; None where it gives none."""
        return self._gather("labels", start, stop) if self.has_labels else None

    def loss_mask(self, start: int, stop: int) -> np.ndarray | None:
        """bool[stop - start], False where a token must not be a target; None where nothing is masked."""
        return self._gather("loss_mask", start, stop) != 0 if self.has_loss_mask else None

    def _gather(self, name: str, start: int, stop: int) -> np.ndarray:
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"{self.path}: tokens [{start}, {stop}) of {self.n_tokens}")
        first = bisect_right(self._bounds, start, hi=len(self._parts)) - 1
        base = self._bounds[first]
        if stop <= self._bounds[first + 1]:
            return slice_part(self._parts[first], name, start - base, stop - base)
        pieces = []
        while start < stop:
            base, end = self._bounds[first], min(stop, self._bounds[first + 1])
            pieces.append(slice_part(self._parts[first], name, start - base, end - base))
            start, first = end, first + 1
        return np.concatenate(pieces)

    @cached_property
    def flat_parts(self) -> list[FlatPart] | None:
        """The parts as arrays for compiled loops; None when labels, masks, rows or unknown documents need more care."""
        if self.has_labels or self.has_loss_mask:
            return None
        flat = []
        for part, base in zip(self._parts, self._bounds):
            tokens, ends = part.tokens, part.doc_ends
            if tokens.ndim != 1 or not tokens.flags.c_contiguous or ends is None or part.unit_ends is not None:
                return None
            # negative numbers become larger than any vocabulary
            tokens = tokens.view(np.dtype(f"<u{tokens.dtype.itemsize}"))
            ends = np.ascontiguousarray(ends)
            ends = ends.view(np.int64) if ends.dtype.itemsize == 8 else ends.astype(np.int64)
            for values in (tokens, ends):
                values.flags.writeable = False
            stop = base + tokens.size
            behind = int(self.read(stop, stop + 1)[0]) if stop < self.n_tokens else IGNORED
            flat.append(FlatPart(tokens, ends, base, behind))
        return flat

    def flat_at(self, starts: np.ndarray, lengths: np.ndarray) -> list[FlatPart] | None:
        """The flat parts that these pieces of the stream lie in; None where it has none, or a piece spans two."""
        flat = self.flat_parts
        if flat is None:
            return None
        first, last = (np.searchsorted(self._starts, at, "right") - 1 for at in (starts, starts + lengths - 1))
        return [flat[p] for p in np.unique(first).tolist()] if np.array_equal(first, last) else None

    @property
    def flat_dtype(self) -> np.dtype[Any] | None:
        """Of the tokens in flat parts, where there are any."""
        return self.flat_parts[0].tokens.dtype if self.flat_parts else None

    def readable_to(self, start: int) -> int:
        """How far one read from `start` may reach; where that is not the end of the source, a document ends there."""
        return self.n_tokens

    def reach(self, n_tokens: int | None) -> int:
        """How many tokens there are; a source that must count them (`LiveText`) stops at `n_tokens` or soon after."""
        return self.n_tokens

    @cached_property
    def n_documents(self) -> int | None:
        """Documents recorded; None when the format keeps no index."""
        if any(part.doc_ends is None for part in self._parts):
            return None
        return sum(self._count_documents(part) for part in self._parts)

    @staticmethod
    def _count_documents(part: Part) -> int:
        counted = 0 if part.doc_ends is None else len(part.doc_ends)
        return counted + len(part.unit_ends) if part.labels is not None and part.unit_ends is not None else counted

    @cached_property
    def doc_ends(self) -> np.ndarray:
        """int64/uint64[n]: cumulative ends of what packing keeps together (documents; whole rows for packed rows)."""
        ends = []
        for part, base in zip(self._parts, self._bounds):
            unit_ends = part.unit_ends if part.unit_ends is not None else part.doc_ends
            ends.append(np.array([part.tokens.size], np.int64) if unit_ends is None else unit_ends)
            if base:
                ends[-1] = ends[-1].astype(np.int64) + base
        return ends[0] if len(ends) == 1 else np.concatenate([end.astype(np.int64, copy=False) for end in ends])

    def end_units(self, stops: np.ndarray) -> np.ndarray:
        """bool[n]: whether what packing keeps together ends at each of these positions > 0."""
        ends = self.doc_ends
        stops = stops.astype(ends.dtype)  # another type would make numpy convert the whole index
        return ends[np.searchsorted(ends, stops)] == stops

    def units_within(self, start: int, stop: int) -> np.ndarray:
        """int64: ends of what packing keeps together that lie between start and stop, neither included."""
        ends = self.doc_ends
        return ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, stop)].astype(np.int64)

    def document_ends(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ends of documents inside ranges: for int64[n] `starts` < `stops`, the ends e with start < e <= stop.

        Returns (offsets int64[n + 1], ends int64[offsets[n]]), ascending within a range.
        """
        if len(self._parts) == 1:
            return part_ends(self._parts[0], starts, stops, self.eos_id)
        first = np.searchsorted(self._starts, starts, "right") - 1
        last = np.searchsorted(self._starts, stops, "left") - 1
        touched = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in set(zip(first.tolist(), last.tolist()))]))
        owners, found = [], []
        for p in touched.tolist():
            ranges = np.flatnonzero((first <= p) & (last >= p))
            size, base = self._parts[p].tokens.size, self._bounds[p]
            low, high = np.maximum(starts[ranges] - base, 0), np.minimum(stops[ranges] - base, size)
            offsets, ends = part_ends(self._parts[p], low, high, self.eos_id)
            owners.append(np.repeat(ranges, np.diff(offsets)))
            found.append(ends + base)
        owner, ends = np.concatenate(owners), np.concatenate(found)
        order = np.argsort(owner, kind="stable")
        owner, ends = owner[order], ends[order]
        return np.searchsorted(owner, np.arange(len(starts) + 1)), ends

    @cached_property
    def fingerprint(self) -> bytes:
        """blake2b (32 bytes) of sizes, dtype, document index and sampled pages of tokens; no path, no times.

        The same stream cut into other files has the same fingerprint.
        """
        digest = hashlib.blake2b(digest_size=32, person=b"megastage source")
        little = self.dtype.newbyteorder("<").str
        digest.update(f"{self.kind} {self.n_tokens} {little} {self.n_documents}".encode())
        digest.update(self._recorded_hash)
        for part, base in zip(self._parts, self._bounds):
            for ends in (part.doc_ends, part.unit_ends):
                if ends is not None:
                    hash_index(digest, ends, base)
        wanted = ((self.read, True), (self.labels, self.has_labels), (self.loss_mask, self.has_loss_mask))
        read: list[Callable[[int, int], Any]] = [gather for gather, there in wanted if there]
        starts = np.linspace(0, max(self.n_tokens - _PAGE_TOKENS, 0), _PAGES).astype(np.int64)
        if len(read) == len(self._parts) == self._parts[0].tokens.ndim == 1 and self.n_tokens >= _PAGE_TOKENS:
            # the bytes of what follows, in one go
            digest.update(self._parts[0].tokens[starts[:, None] + np.arange(_PAGE_TOKENS)].data)
            return digest.digest()
        for start in starts.tolist():
            for gather in read:
                digest.update(np.ascontiguousarray(gather(start, min(start + _PAGE_TOKENS, self.n_tokens))).data)
        return digest.digest()

    def close(self) -> None:
        """Let go of what works in the background."""


def map_array(file: Path, dtype: Any, *, offset: int = 0, count: int | None = None) -> np.ndarray:
    """A read-only map of a file (or part of it) as a plain ndarray: slices are twice as fast as np.memmap's.

    Raises SourceError when the file is missing, empty, or no whole number of items.
    """
    kind = np.dtype(dtype)
    try:
        size = os.stat(file).st_size - offset
    except FileNotFoundError:
        raise SourceError(f"{file}: no such file") from None
    if count is None:
        if size <= 0:
            raise SourceError(f"{file}: empty; remove it or write it again")
        if size % kind.itemsize:
            raise SourceError(
                f"{file}: {size} bytes are no whole number of {kind.itemsize}-byte items ({kind.name}): "
                "the file is truncated or of another type; write it again"
            )
        count = size // kind.itemsize
    elif size < count * kind.itemsize:
        raise SourceError(
            f"{file}: truncated: {size} bytes from offset {offset}, {count} items of {kind.name} need "
            f"{count * kind.itemsize}; write it again"
        )
    try:
        return map_file(file, kind, count, offset)
    except PermissionError:
        raise SourceError(f"{file}: not readable by this user; change its permissions") from None


def check_ends(file: Path, ends: np.ndarray, total: int, *, what: str = "document end", items: str = "tokens") -> None:
    """Document ends must ascend (an empty document repeats one) and stop at `total`. Raises SourceError."""
    if not ends.size:
        raise SourceError(f"{file}: no {what}s; write the index again or remove it")
    chunk, last = 1 << 22, 0
    for start in range(0, len(ends), chunk):
        # one more than the last of the chunk before, so that a step back between chunks is seen
        part = ends[start : start + chunk]
        bad = np.flatnonzero(part[1:] < part[:-1])
        if int(part[0]) < last or bad.size:
            where = start if int(part[0]) < last else start + 1 + int(bad[0])
            raise SourceError(
                f"{file}: {what} {where} is {int(ends[where])}, smaller than the one in front of it; "
                "the index is damaged, write it again"
            )
        last = int(part[-1])
    if last != total:
        raise SourceError(
            f"{file}: the last {what} is {last}, but there are {total} {items}; "
            "index and data do not belong together, write both again"
        )


def files_of(path: Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """The one file `path`, or the files directly in folder `path` with one of the suffixes, in sorted order."""
    if path.is_file():
        return [path]
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder; check the path of this {what} source")
    found = sorted(file for file in path.iterdir() if file.name.endswith(tuple(suffixes)) and not file.is_dir())
    lost = [file for file in found if not file.exists()]
    if lost:
        raise SourceError(f"{lost[0]}: a link to {os.readlink(lost[0])}, which is not there; mend it or remove it")
    if not found:
        raise SourceError(f"{path}: holds no {what} file ({', '.join('*' + suffix for suffix in suffixes)})")
    return found


def open_source(dataset_type: str, path: str | os.PathLike[str], options: SourceOptions | None = None) -> TokenSource:
    """Open a data set of a given type. Raises SourceError (a ValueError) that names file, value and way out."""
    if dataset_type not in READERS:
        raise SourceError(f"dataset_type {dataset_type!r} is not known; choose one of {', '.join(sorted(READERS))}")
    options = options or SourceOptions()
    module = importlib.import_module(f"megastage.data.sources.{READERS[dataset_type]}")
    reader: Callable[[Path | str, SourceOptions], TokenSource] = module.open_folder
    local = path
    try:
        if "://" in str(path):
            local = importlib.import_module("megastage.data.sources.remote").fetch(str(path), options)
        source = reader(str(local) if dataset_type == "huggingface" else Path(local), options)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read as {dataset_type} ({error})") from error
    except ValueError as error:
        if local is path:
            raise
        raise SourceError(str(error).replace(str(local), str(path))) from error
    source.path = str(path)
    return source


def without_building(options: SourceOptions) -> SourceOptions:
    """The same options for a process that may only read the cache."""
    return replace(options, may_build=False)


def is_cached(dataset_type: str, path: str) -> bool:
    """Whether opening writes to the node's cache, which one process of the node must do before the others."""
    return dataset_type in ("huggingface", "preprocessed") or "://" in path
