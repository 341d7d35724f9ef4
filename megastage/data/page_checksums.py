"""Checksums of a file's pages, made while it is written."""

from __future__ import annotations

import zlib

import numpy as np


class PageChecksums:
    """CRC-32 of each page of a byte stream that comes in pieces of any size."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._filled = 0
        self._crc32 = 0
        self._done: list[int] = []

    def update(self, content: bytes) -> None:
        """The next bytes of the stream."""
        view = memoryview(content)
        while view:
            part = view[: self._page_bytes - self._filled]
            self._crc32 = zlib.crc32(part, self._crc32)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == self._page_bytes:
                self._done.append(self._crc32)
                self._filled = self._crc32 = 0

    def finish(self) -> bytes:
        """One little-endian uint32 a page, the last one's too where it is not full."""
        last = [self._crc32] if self._filled else []
        return np.array(self._done + last, dtype="<u4").tobytes()
