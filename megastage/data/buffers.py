"""Memory for batches, used again: fresh pages cost more time than the tokens that are written into them."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

_KEPT = 64  # free blocks of one kind; more than any prefetching leaves over


class BufferPool:
    """Lends one-dimensional arrays; what nobody holds any more (tensor, view, copy in flight) is lent again.

    Safe for several threads. Blocks of other sizes than those asked for lately are given back to the system.
    """

    def __init__(self, *, pin: bool = False) -> None:
        """pin: page-locked memory, which torch's allocator keeps and lends itself."""
        self._pin = pin
        self._free: dict[tuple[int, str], deque[np.ndarray]] = {}

    def tensor(self, n: int) -> Tensor:
        """int64[n], not initialised."""
        if self._pin:
            return torch.empty(n, dtype=torch.int64, pin_memory=True)
        # the tensor holds the view, not the block: when its storage goes, so does the view
        view = self.array(n, np.int64)
        return torch.from_numpy(view)

    def array(self, n: int, dtype: Any) -> np.ndarray:
        """dtype[n], not initialised. Lent again as soon as this very object is gone: keep it, not only views of it."""
        key = (n, np.dtype(dtype).str)
        free = self._free.get(key)
        if free is None:
            if len(self._free) >= 4:
                self._free = {}
            free = self._free[key] = deque(maxlen=_KEPT)
        try:
            block = free.pop()
        except IndexError:
            block = np.empty(n, dtype)
        view = block[:]
        weakref.finalize(view, free.append, block).atexit = False
        return view
