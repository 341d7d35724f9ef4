"""How rows are read fast: compiled loops where numba is there and sources are plain, and memory that is used again."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megastage.data.buffers import BufferPool
from megastage.data.compiled_rows import ALL_ENDS, NO_ENDS, PIECE_ENDS, RowKernels, row_kernels, warm
from megastage.data.order import Rows
from megastage.data.sources.base import IGNORED, TokenSource

COMPILE_FROM = 1 << 18  # tokens a batch; smaller ones are read before numba is imported
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class RowTools:
    """What `assemble` may use besides numpy. kernels: None, or the compiled loops; pool: where memory comes from."""

    pool: BufferPool = field(default_factory=BufferPool)
    kernels: RowKernels | None = None
    _scratch: threading.local = field(default_factory=threading.local)

    @classmethod
    def make(cls, sources: Iterable[TokenSource], batch_tokens: int, *, pin: bool = False) -> RowTools:
        """With compiled loops, ready for these sources, when batches are large enough to be worth it."""
        kernels = row_kernels() if batch_tokens >= COMPILE_FROM else None
        if kernels is not None:
            warm(kernels, {source.flat_dtype for source in sources if source.flat_dtype is not None})
        return cls(BufferPool(pin=pin), kernels)

    def scratch(self, name: str, n: int, dtype: Any = np.int64) -> np.ndarray:
        """dtype[n or more] with anything in it, this thread's until it asks for the same name again."""
        kept = self._scratch.__dict__.get(name)
        if kept is None or kept.size < n:
            kept = self._scratch.__dict__[name] = np.empty(n, dtype)
        return kept


def fill_compiled(
    tools: RowTools,
    sources: Sequence[TokenSource],
    source_B: np.ndarray,
    rows: Rows,
    tokens: np.ndarray,
    labels: np.ndarray,
    *,
    document_mask: bool,
    vocab_size: int | None,
) -> np.ndarray | None:
    """Fill tokens and labels, int64[B * T], and return cu_seqlens, int32[B, C].

    None (and unspecified contents) where a source needs what only the plain code does, or holds a wrong token.
    """
    kernels, B = tools.kernels, len(source_B)
    if kernels is None:
        return None
    T, P = len(tokens) // B, len(rows.starts)
    source_B = np.ascontiguousarray(source_B, np.int64)
    offsets, starts, lengths = (np.ascontiguousarray(values, np.int64) for values in rows)
    found, n_found = tools.scratch("found", len(tokens) if document_mask else 0, np.int32), np.zeros(1, np.int64)
    first_P, count_P = tools.scratch("first", P), tools.scratch("count", P)
    count_P[:P] = 0
    limit = np.uint64(_NO_LIMIT if vocab_size is None else vocab_size)
    for number in [0] if len(sources) == 1 else np.unique(source_B).tolist():
        source = sources[number]
        parts = source.flat_parts
        if parts is None or len(parts) > 1:
            mine_P = np.repeat(source_B == number, np.diff(offsets))
            parts = source.flat_at(starts[mine_P], lengths[mine_P])
        if parts is None:
            return None
        mode = ALL_ENDS if document_mask else PIECE_ENDS if source.kind == "documents" else NO_ENDS
        for part in parts:
            if part.behind != IGNORED and not 0 <= part.behind < limit:
                return None
            bad = kernels.fill(
                part.tokens, part.ends, part.base, part.behind, number, source_B, offsets, starts, lengths, T, mode,
                limit, tokens, labels, found, n_found, first_P, count_P,
            )  # fmt: skip
            if bad >= 0:
                return None
    mode = ALL_ENDS if document_mask else PIECE_ENDS
    return kernels.finish(offsets, lengths, found, first_P, count_P, T, mode, tokens, labels)
