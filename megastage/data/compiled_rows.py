"""Rows of a batch in compiled loops, without Python's lock: the twin of the numpy code in `batch`, with equal results.

Legend: B rows, T tokens of a row, P pieces, C document bounds. All arrays are int64 and contiguous unless said.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from megastage.data import compiled

IGNORED = -100  # as the readers' constant; compiled code takes it as a literal
NO_ENDS, PIECE_ENDS, ALL_ENDS = 0, 1, 2  # look for no document ends, for those at a piece's end, for all of them


class RowKernels(NamedTuple):
    """See `row_loops`."""

    fill: Callable[..., int]
    finish: Callable[..., np.ndarray]
    positions: Callable[..., None]


@lru_cache(maxsize=1)
def row_kernels() -> RowKernels | None:
    """The compiled loops, or None where numba is missing or switched off. Not yet compiled for any type: see `warm`."""
    if not compiled.available():
        return None
    from megastage.data import row_loops

    return RowKernels(row_loops.fill, row_loops.finish, row_loops.positions)


def row_kernels_in_use() -> RowKernels | None:
    """The loops if something has asked for them already: what they do once more is no reason to import numba."""
    return row_kernels() if row_kernels.cache_info().currsize else None


def warm(kernels: RowKernels, dtypes: set[np.dtype[Any]]) -> None:
    """Compile (or load from numba's cache) for sources of these token types, all unsigned."""
    none, mark, out, found = np.empty(0, np.int64), np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0, np.int32)
    ends = np.empty(0, np.int64)
    ends.flags.writeable = False
    for dtype in dtypes:
        tokens = np.empty(0, dtype)
        tokens.flags.writeable = False
        kernels.fill(
            tokens, ends, 0, -1, 0, none, mark, none, none, 1, ALL_ENDS, np.uint64(1), out, out, found, mark, none, none
        )
    kernels.finish(mark, none, found, none, none, 1, ALL_ENDS, out, out)
    kernels.positions(np.empty((0, 1), np.int32), 1, out)
