"""The manifest of a checkpoint: one JSON file, written last, that says where every byte of every tensor lies.

It holds what torch.distributed.checkpoint (DCP) calls Metadata, as plain data: per tensor its dtype, global shape and
chunks (file, first byte, global offsets, sizes, CRC32), per file its size and the CRC32 of its header. The last line
carries the SHA-256 of all bytes before it, so a manifest is either exactly what was written or refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megastage.checkpoint.errors import BadCheckpoint

FORMAT = "megastage.checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
TRAIN_STATE = "train_state.json"
SHARD_NAME = re.compile(r"rank-\d{5,}(-\d+)?\.safetensors")
DTYPES: dict[str, torch.dtype] = {  # safetensors' names
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileRecord:
    """A file of the checkpoint. `header_bytes` is the part before the first tensor (the whole file for JSON files)."""

    name: str
    n_bytes: int
    header_bytes: int
    header_crc32: int


@dataclass(frozen=True)
class ChunkRecord:
    """A box of a global tensor: its elements [offsets, offsets + sizes) lie row-major at `begin` of file `file`."""

    file: int
    begin: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    crc32: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor by its global shape, in chunks that cover it without overlap."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[ChunkRecord, ...]

    def chunk_bytes(self, chunk: ChunkRecord) -> int:
        """Size of one chunk in bytes."""
        return math.prod(chunk.sizes) * self.dtype.itemsize


@dataclass
class Manifest:
    """Contents of manifest.json. `contents` is "full" or "model" (no optimizer state, so no resume from it)."""

    step: int
    contents: str
    files: list[FileRecord]
    tensors: dict[str, TensorRecord]
    versions: dict[str, str] = field(default_factory=dict)
    digest: str = ""

    def dump(self) -> bytes:
        """The file's bytes: valid JSON with one line per file and tensor, sealed by the digest on the last line."""
        head = {"format": FORMAT, "version": VERSION, "step": self.step, "contents": self.contents}
        head["versions"] = self.versions
        lines = [_compact(head)[:-1], '"files":[']
        lines += _joined(_compact([f.name, f.n_bytes, f.header_bytes, f.header_crc32]) for f in self.files)
        lines += ['],"tensors":{']
        lines += _joined(f"{_compact(key)}:{_compact(_tensor_json(self.tensors[key]))}" for key in sorted(self.tensors))
        body = (",\n".join(lines[:2]) + "\n" + "\n".join([*lines[2:], "}"])).encode()
        return body + _seal(body)

    def metadata(self, keys: Iterable[str]) -> Metadata:
        """DCP's Metadata for `keys`, which must be in the manifest."""
        out: dict[str, STORAGE_TYPES] = {}
        for key in keys:
            tensor = self.tensors[key]
            chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
            out[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape), chunks)
        return Metadata(out)


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check `folder`/manifest.json. Raises BadCheckpoint for anything but the exact bytes once written."""
    path = Path(folder, MANIFEST)
    raw = read_bytes(path)
    seal_size = len(_seal(b""))
    body = raw[:-seal_size]
    if len(raw) <= seal_size or raw[-seal_size:] != _seal(body):
        raise BadCheckpoint(f"{path}: its digest does not match its contents (damaged or cut short)", file=str(path))
    try:
        data = json.loads(raw)
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise BadCheckpoint(
                f"{path}: format {data['format']!r} {data['version']!r}, this reader knows {FORMAT!r} {VERSION}",
                file=str(path),
            )
        manifest = Manifest(
            step=int(data["step"]),
            contents=str(data["contents"]),
            files=[FileRecord(str(n), int(size), int(head), int(crc)) for n, size, head, crc in data["files"]],
            tensors={name: _tensor_from_json(entry) for name, entry in data["tensors"].items()},
            versions=data["versions"],
            digest=data["sha256"],
        )
        _check(manifest)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadCheckpoint):
            raise
        raise BadCheckpoint(f"{path}: not a manifest this reader can trust: {error}", file=str(path)) from error
    return manifest


def read_train_state(folder: str | os.PathLike[str], manifest: Manifest) -> dict[str, Any]:
    """Read and verify the train state that belongs to `manifest`."""
    path = Path(folder, TRAIN_STATE)
    record = next((f for f in manifest.files if f.name == TRAIN_STATE), None)
    if record is None:
        raise BadCheckpoint(f"{path}: the manifest lists no train state", file=str(path))
    raw = read_bytes(path)
    if len(raw) != record.n_bytes or zlib.crc32(raw) != record.header_crc32:
        raise BadCheckpoint(f"{path}: {len(raw)} bytes whose CRC32 is not the saved one", file=str(path))
    state = json.loads(raw)
    if not isinstance(state, dict):
        raise BadCheckpoint(f"{path}: a JSON object was expected, not {type(state).__name__}", file=str(path))
    return state


def check_sizes(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Compare the size of every file with the manifest: finds missing and cut files without reading them."""
    for number, record in enumerate(manifest.files):
        path = Path(folder, record.name)
        try:
            size = path.stat().st_size
        except FileNotFoundError as error:
            names, first = _tensors_beyond(manifest, number, 0)
            raise BadCheckpoint(f"{path}: the file is missing{names}", file=str(path), tensor=first) from error
        if size != record.n_bytes:
            names, first = _tensors_beyond(manifest, number, size)
            text = f"{path}: {size} bytes on disk, {record.n_bytes} were saved{names}"
            raise BadCheckpoint(text, file=str(path), tensor=first)


def _tensors_beyond(manifest: Manifest, file: int, size: int) -> tuple[str, str | None]:
    """What of the tensors in a file lies beyond its first `size` bytes: in words, and the first one's key."""
    lost = sorted(
        (chunk.begin, key)
        for key, tensor in manifest.tensors.items()
        for chunk in tensor.chunks
        if chunk.file == file and tensor.chunk_bytes(chunk) > max(size - chunk.begin, 0)
    )
    if not lost:
        return "", None
    count = "tensor" if len(lost) == 1 else f"{len(lost)} tensors, the first of them"
    return f"; lost is {count} {lost[0][1]}", lost[0][1]


def read_bytes(path: Path) -> bytes:
    """The bytes of a file of a checkpoint; a missing or unreadable one is a BadCheckpoint."""
    try:
        with open_confined(path) as file:
            return file.read()
    except FileNotFoundError as error:
        raise BadCheckpoint(f"{path}: the file is missing", file=str(path)) from error


def open_confined(path: Path) -> Any:
    """Open a regular file for reading: no symbolic link, which could lead out of the folder, and no pipe, which would
    keep the reader waiting."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise BadCheckpoint(f"{path}: a symbolic link, a regular file was expected", file=str(path)) from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise BadCheckpoint(f"{path}: not a regular file", file=str(path))
    return os.fdopen(file, "rb", buffering=0)


def _check(manifest: Manifest) -> None:
    """Everything a reader relies on: confined names, chunks inside their tensor and file, no byte unaccounted for."""
    names = [f.name for f in manifest.files]
    for name in names:
        if name != TRAIN_STATE and not SHARD_NAME.fullmatch(name):
            raise ValueError(f"file name {name!r} is not one of a checkpoint (rank-NNNNN.safetensors)")
    if len(set(names)) != len(names):
        raise ValueError("a file is listed twice")
    if manifest.contents not in ("full", "model"):
        raise ValueError(f"contents {manifest.contents!r} is neither 'full' nor 'model'")
    covered = [f.header_bytes for f in manifest.files]
    for key, tensor in manifest.tensors.items():
        volume = 0
        for chunk in tensor.chunks:
            if not (len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape)):
                raise ValueError(f"tensor {key}: a chunk has another number of dimensions than shape {tensor.shape}")
            if any(o < 0 or n < 0 or o + n > d for o, n, d in zip(chunk.offsets, chunk.sizes, tensor.shape)):
                raise ValueError(f"tensor {key}: chunk at {chunk.offsets} of {chunk.sizes} leaves shape {tensor.shape}")
            if not 0 <= chunk.file < len(manifest.files):
                raise ValueError(f"tensor {key}: file number {chunk.file} of {len(manifest.files)}")
            record, n_bytes = manifest.files[chunk.file], tensor.chunk_bytes(chunk)
            if chunk.begin < record.header_bytes or chunk.begin + n_bytes > record.n_bytes:
                raise ValueError(f"tensor {key}: bytes {chunk.begin} + {n_bytes} lie outside {record.name}")
            covered[chunk.file] += n_bytes
            volume += math.prod(chunk.sizes)
        if volume != math.prod(tensor.shape):
            raise ValueError(f"tensor {key}: chunks hold {volume} elements, shape {tensor.shape} has another number")
    for record, n_bytes in zip(manifest.files, covered):
        if n_bytes != record.n_bytes:
            raise ValueError(f"file {record.name}: {n_bytes} of {record.n_bytes} bytes belong to a tensor or header")


def _tensor_json(tensor: TensorRecord) -> dict[str, Any]:
    chunks = [[c.file, c.begin, list(c.offsets), list(c.sizes), c.crc32] for c in tensor.chunks]
    return {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "chunks": chunks}


def _tensor_from_json(data: dict[str, Any]) -> TensorRecord:
    chunks = tuple(
        ChunkRecord(int(file), int(begin), tuple(map(int, offsets)), tuple(map(int, sizes)), int(crc))
        for file, begin, offsets, sizes, crc in data["chunks"]
    )
    return TensorRecord(DTYPES[data["dtype"]], tuple(map(int, data["shape"])), chunks)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _joined(lines: Iterable[str]) -> Iterator[str]:
    previous: str | None = None
    for line in lines:
        if previous is not None:
            yield previous + ","
        previous = line
    if previous is not None:
        yield previous


def _seal(body: bytes) -> bytes:
    """The last line of a manifest; of constant length, so a reader knows where the sealed part ends."""
    return f',\n"sha256":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()
