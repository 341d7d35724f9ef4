"""Megatron's indexed data sets: PREFIX.bin with the tokens, PREFIX.idx with sequence lengths and document bounds.

PREFIX.idx, little-endian: magic `MMIDIDX\\0\\0`, uint64 version 1, uint8 dtype code, uint64 sequences N, uint64 bounds
D (documents + 1), then int32[N] lengths in tokens, int64[N] byte offsets, int64[D] bounds as sequence numbers.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megastage.data.durable import fsync_path
from megastage.data.packed_memmap import TokenizerFacts

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK_TOKENS = 1 << 22


class MegatronError(ValueError):
    """A .bin/.idx pair that cannot be read; the message names the file and the way out."""


def prefix_of(path: str | os.PathLike[str]) -> Path:
    """The prefix that PREFIX, PREFIX.bin and PREFIX.idx share."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def read_index(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens: a map of PREFIX.bin, document ends: uint64[documents]). Raises MegatronError."""
    prefix = prefix_of(path)
    tokens_file, index_file = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for file in (tokens_file, index_file):
        if not file.is_file():
            raise MegatronError(f"{file}: missing; a megatron data set is PREFIX.bin and PREFIX.idx")
    size = index_file.stat().st_size
    with open(index_file, "rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise MegatronError(f"{index_file}: does not begin as a megatron index; restore it or preprocess again")
    _, version, code, n_sequences, n_bounds = _HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise MegatronError(f"{index_file}: version {version}, dtype code {code}; read is version 1 with integers")
    expected = _HEADER.size + 12 * n_sequences + 8 * n_bounds
    if size != expected:
        raise MegatronError(f"{index_file}: {size} bytes, but its header calls for {expected}; restore it")
    lengths, offsets, bounds = _index_arrays(index_file, n_sequences, n_bounds)
    dtype = np.dtype(DTYPES[code])
    tokens_bytes = tokens_file.stat().st_size
    ends = np.cumsum(lengths, dtype=np.int64)
    sound = n_bounds >= 1 and bounds[0] == 0 and bounds[-1] == n_sequences and bool((np.diff(bounds) >= 0).all())
    if not sound or (n_sequences and int(lengths.min()) < 0):
        raise MegatronError(f"{index_file}: its lengths or document bounds are not in order; restore it")
    if not np.array_equal(offsets, (ends - lengths) * dtype.itemsize):
        raise MegatronError(f"{index_file}: its byte offsets are not those of sequences end to end; restore it")
    n_tokens = int(ends[-1]) if n_sequences else 0
    if tokens_bytes != n_tokens * dtype.itemsize or not n_tokens:
        raise MegatronError(f"{tokens_file}: {tokens_bytes} bytes, the index calls for {n_tokens} tokens of {dtype}")
    tokens = np.memmap(tokens_file, dtype=dtype, mode="r", shape=(n_tokens,)).view(np.ndarray)
    return tokens, np.concatenate([[0], ends])[bounds[1:]].astype("<u8")


def _index_arrays(file: Path, n_sequences: int, n_bounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    content = np.fromfile(file, dtype=np.uint8, offset=_HEADER.size)
    lengths, offsets, bounds = np.split(content, [4 * n_sequences, 12 * n_sequences])
    assert bounds.size == 8 * n_bounds
    return lengths.view("<i4").astype(np.int64), offsets.copy().view("<i8"), bounds.copy().view("<i8")


class MegatronWriter:
    """Streams documents, one sequence each, into PREFIX.bin and PREFIX.idx; the index is renamed into place last.

    Tokens are uint16, or int32 where the other formats use uint32. EOS and tokenizer have no place in the format.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: str,
        *,
        eos_id: int | None = None,
        tokenizer: TokenizerFacts | None = None,
        tokenizer_json: bytes | None = None,
        overwrite: bool = False,
    ) -> None:
        """Raises ValueError for a dtype other than uint16/uint32, or files that exist."""
        if dtype not in ("uint16", "uint32"):
            raise ValueError(f"dtype {dtype!r}: expected 'uint16' or 'uint32'")
        self._code, self._limit = (8, 1 << 16) if dtype == "uint16" else (4, 1 << 31)
        self._dtype = np.dtype(DTYPES[self._code])
        self.folder = Path(os.path.abspath(prefix_of(prefix)))
        self._finals = [Path(f"{self.folder}.{suffix}") for suffix in ("bin", "idx")]
        for file in self._finals:
            if os.path.lexists(file) and not overwrite:
                raise ValueError(f"{file}: exists already; choose another output or --overwrite it")
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = [Path(f"{file}.partial") for file in self._finals]
        self._tokens: BinaryIO = open(self._temporary[0], "wb", buffering=1 << 20)  # noqa: SIM115
        self._lengths: list[np.ndarray] = []
        self.n_tokens = 0
        self.n_documents = 0

    def extend(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add several documents: their tokens end to end, and the length of each in tokens."""
        sizes = np.asarray(lengths, dtype=np.int64)
        assert int(sizes.sum()) == tokens.size
        if sizes.size and int(sizes.max()) >= 1 << 31:
            raise ValueError(f"a document of {int(sizes.max())} tokens is too long for a megatron index (2^31)")
        for start in range(0, tokens.size, _CHUNK_TOKENS):
            part = tokens[start : start + _CHUNK_TOKENS]
            if int(part.min()) < 0 or int(part.max()) >= self._limit:
                raise ValueError(f"token {int(part.max())} does not fit a megatron file of {self._dtype}")
            self._tokens.write(part.astype(self._dtype).tobytes())
        self._lengths.append(sizes.astype("<i4"))
        self.n_tokens += tokens.size
        self.n_documents += sizes.size

    def finish(self) -> None:
        """Sync the tokens, write the index and rename both, the index last."""
        if not self.n_tokens:
            self.abort()
            raise ValueError(f"{self.folder}: no tokens were written, and an empty data set is of no use")
        self._tokens.close()
        lengths = np.concatenate(self._lengths)
        offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * self._dtype.itemsize
        with open(self._temporary[1], "wb") as stream:
            stream.write(_HEADER.pack(MAGIC, 1, self._code, lengths.size, lengths.size + 1))
            for array in (lengths, offsets.astype("<i8"), np.arange(lengths.size + 1, dtype="<i8")):
                array.tofile(stream)
        for file in self._temporary:
            fsync_path(file)
        # A reader needs both files: with the old index gone first, no mixture of old and new is ever readable.
        self._finals[1].unlink(missing_ok=True)
        for temporary, final in zip(self._temporary, self._finals, strict=True):
            os.replace(temporary, final)
        fsync_path(self.folder.parent)

    def abort(self) -> None:
        """Drop what was written; earlier files of that name are untouched."""
        self._tokens.close()
        for file in self._temporary:
            file.unlink(missing_ok=True)
