"""Nanosets as datatrove defines them: NAME.ds, NAME.ds.index and NAME.ds.metadata.

The folder is staged beside its target and renamed into place, so no half-written file is ever seen by a reader.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megastage.data.durable import StagedFolder, close_discarded, fsync_path, write_atomically
from megastage.data.packed_memmap import TOKENIZER, TokenizerFacts, token_bytes

NAME = "tokens.ds"
UNKNOWN = "Unknown Tokenizer"
_SUFFIXES = (".ds", ".ds.index", ".ds.metadata", ".ds.loss")


def is_ours(name: str) -> bool:
    """Whether a file name belongs to a nanoset folder (other files keep it from being overwritten)."""
    return name.endswith(_SUFFIXES) or name == TOKENIZER


class NanosetWriter:
    """Streams documents into a new nanoset folder; the counterpart of PackedMemmapWriter.

    `eos_id` is taken for symmetry: the format has no place for it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        dtype: str,
        *,
        eos_id: int | None = None,
        tokenizer: TokenizerFacts | None = None,
        tokenizer_json: bytes | None = None,
        overwrite: bool = False,
    ) -> None:
        """Raises ValueError for a dtype other than uint16/uint32, or a folder that exists."""
        if dtype not in ("uint16", "uint32"):
            raise ValueError(f"dtype {dtype!r}: a nanoset holds 'uint16' or 'uint32'")
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._tokenizer = tokenizer
        self._limit = min(1 << (8 * self._dtype.itemsize), tokenizer.id_limit if tokenizer else 1 << 32)
        self.n_tokens = 0
        self.n_documents = 0
        self._staged = StagedFolder(folder, overwrite=overwrite, is_ours=is_ours)
        self.folder = self._staged.target
        if tokenizer_json is not None:
            write_atomically(self._staged.path / TOKENIZER, tokenizer_json)
        self._tokens: BinaryIO = open(self._staged.path / NAME, "wb", buffering=1 << 20)  # noqa: SIM115
        self._index: BinaryIO = open(self._staged.path / f"{NAME}.index", "wb", buffering=1 << 16)  # noqa: SIM115

    def extend(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add several documents: their tokens end to end, and the length of each in tokens."""
        sizes = np.asarray(lengths, dtype=np.int64)
        assert int(sizes.sum()) == tokens.size
        for content in token_bytes(tokens, self._dtype, self._limit):
            self._tokens.write(content)
        self._index.write((self.n_tokens + np.cumsum(sizes)).astype("<u8").tobytes())
        self.n_tokens += tokens.size
        self.n_documents += sizes.size

    def finish(self) -> None:
        """Sync everything, write the metadata and rename the folder into place."""
        if not self.n_tokens:
            self.abort()
            raise ValueError(f"{self.folder}: no tokens were written, and an empty data set is of no use")
        for file in (self._tokens, self._index):
            file.close()
            fsync_path(Path(file.name))
        write_atomically(self._staged.path / f"{NAME}.metadata", self._metadata())
        self._staged.commit()

    def _metadata(self) -> bytes:
        name = self._tokenizer.name if self._tokenizer else UNKNOWN
        lines = (f"{name}|{self._dtype.itemsize}", str(self.n_tokens), human_count(self.n_tokens))
        return "\n".join(lines).encode("utf-8")

    def abort(self) -> None:
        """Drop what was written; an earlier data set of that name is untouched."""
        close_discarded(self._tokens, self._index)
        self._staged.discard()


def human_count(count: int) -> str:
    """A token count with three significant digits and an SI prefix, as the third metadata line has it."""
    power = min((len(str(count)) - 1) // 3, 8)
    value = f"{count / 1000**power:.{max(0, 2 - (len(str(count)) - 1) % 3)}f}"
    return f"{value} {['', 'k', 'M', 'G', 'T', 'P', 'E', 'Z', 'Y'][power]}T"
