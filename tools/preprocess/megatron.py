"""Writes Megatron's indexed data sets: PREFIX.bin with tokens, PREFIX.idx with sequence lengths and document bounds.

PREFIX.idx, little-endian: magic `MMIDIDX\\0\\0`, uint64 version 1, uint8 dtype code, uint64 sequences N, uint64 bounds
D (documents + 1), then int32[N] lengths in tokens, int64[N] byte offsets, int64[D] bounds as sequence numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megastage.data.durable import close_discarded, fsync_path
from megastage.data.packed_memmap import TokenizerFacts, token_bytes
from megastage.data.sources.megatron import DTYPES, HEADER, MAGIC

_CODES = {"uint16": 8, "uint32": 4}  # what is written for a dtype of the other formats


def prefix_of(path: str | os.PathLike[str]) -> Path:
    """The prefix that PREFIX, PREFIX.bin and PREFIX.idx share."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def losses(index: Path, dtype: str) -> Iterator[str]:
    """What of a file that was opened before gets lost where its documents are written again, here too, as `dtype`."""
    with open(index, "rb") as stream:
        stream.seek(len(MAGIC))
        _, code, n_sequences, n_bounds = HEADER.unpack(stream.read(HEADER.size))
    if code not in _CODES.values():
        yield f"{index}: its {np.dtype(DTYPES[code]).name} tokens become {dtype}"
    if n_sequences != n_bounds - 1:
        yield f"{index}: its {n_sequences:,} sequences are joined to {n_bounds - 1:,} documents"


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
        if dtype not in _CODES:
            raise ValueError(f"dtype {dtype!r}: expected 'uint16' or 'uint32'")
        self._code, self._limit = _CODES[dtype], 1 << (16 if dtype == "uint16" else 31)
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
        for content in token_bytes(tokens, self._dtype, self._limit):
            self._tokens.write(content)
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
            stream.write(MAGIC + HEADER.pack(1, self._code, lengths.size, lengths.size + 1))
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
        close_discarded(self._tokens)
        for file in self._temporary:
            file.unlink(missing_ok=True)
