"""Files of text, plain or compressed, as streams of bytes whose errors, a truncated file among them, name the file."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

BLOCK_BYTES = 1 << 20
# A block of zstd takes 4 bytes or more and gives at most 128 KiB, so that a step of hostile data gives 128 MiB at most.
_STEP_BYTES = 1 << 12


@contextmanager
def opened(
    path: str | os.PathLike[str], compression: str, error: type[ValueError]
) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A buffered stream of a file's uncompressed bytes, and the raw file under it for its position.

    compression: "", "gz" or "zst", several members or frames one after the other included. Reading raises `error`
    naming the file where data are damaged or end early, opening where the library is missing or the file is empty.
    """
    with open(path, "rb", buffering=BLOCK_BYTES) as raw:
        if not compression:
            yield raw, raw
            return
        if not os.fstat(raw.fileno()).st_size:
            raise error(f"{path}: empty, and so no {compression} file; compress it again or remove it")
        inner = _Gzip(path, raw, error) if compression == "gz" else _Zstd(path, raw, error)
        with io.BufferedReader(inner, BLOCK_BYTES) as stream:
            yield cast(BinaryIO, stream), raw


class _Gzip(io.RawIOBase):
    def __init__(self, path: str | os.PathLike[str], raw: BinaryIO, error: type[ValueError]) -> None:
        self._path, self._error = path, error
        self._file = gzip.GzipFile(fileobj=raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._file.readinto(buffer)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise self._error(f"{self._path}: damaged gzip data ({error}); compress it again or remove it") from None


class _Zstd(io.RawIOBase):
    """zstandard's own stream reader stops after a first frame and takes a truncated file for a whole one."""

    def __init__(self, path: str | os.PathLike[str], raw: BinaryIO, error: type[ValueError]) -> None:
        try:
            import zstandard
        except ImportError:
            raise error(f"{path}: .zst files need the library: pip install zstandard") from None
        self._path, self._raw, self._error, self._library = path, raw, error, zstandard
        self._frame: Any = None  # the frame being read, None between frames
        self._compressed = memoryview(b"")
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._compressed = self._compressed or memoryview(self._raw.read(1 << 17))
            if not self._compressed:
                if self._frame is not None:
                    raise self._error(f"{self._path}: the zstd data end early; compress it again or remove it")
                return 0
            self._decompress()
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._library.ZstdDecompressor().decompressobj()
        step = self._compressed[:_STEP_BYTES]
        try:
            self._text = memoryview(self._frame.decompress(step))
        except (self._library.ZstdError, MemoryError) as error:
            raise self._error(f"{self._path}: damaged zstd data ({error}); compress it again") from None
        unused = len(self._frame.unused_data) if self._frame.eof else 0
        self._compressed = self._compressed[len(step) - unused :]
        if self._frame.eof:
            self._frame = None
