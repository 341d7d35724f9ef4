"""Tensor shards in safetensors files, written and read under torch.distributed.checkpoint's planners.

Each rank writes one file (or a few, in parallel): an 8-byte length, a JSON header, then the chunks without gaps, so
any safetensors reader opens it. CRC32 is taken of the very bytes handed to the file. Nothing is ever unpickled: byte
items, which DCP would pass through torch.load, are refused by writer and reader.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

import megastage
from megastage.checkpoint.errors import BadCheckpoint, CheckpointFailed
from megastage.checkpoint.manifest import (
    DTYPE_NAMES,
    MANIFEST,
    TRAIN_STATE,
    ChunkRecord,
    FileRecord,
    Manifest,
    TensorRecord,
    open_confined,
    read_manifest,
)

PIECE_BYTES = 8 << 20  # written and checksummed at a time: small enough for the cache, large enough for the disk


@dataclass(frozen=True)
class ChunkWritten:
    """Where a write item went: what a writer reports for the manifest."""

    file: FileRecord
    begin: int
    crc32: int


class ManifestWriter(StorageWriter):
    """DCP storage writer of one rank.

    folder: an existing empty folder. The train state is rank 0's JSON object; `finish` writes it and, last of all, the
    manifest. files_per_rank > 1 writes that many files in as many threads.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        rank: int = 0,
        step: int = 0,
        contents: str = "full",
        train_state: bytes = b"{}",
        files_per_rank: int = 1,
    ) -> None:
        self.folder = Path(folder)
        self.rank = rank
        self.step = step
        self.contents = contents
        self.train_state = train_state
        self.files_per_rank = files_per_rank

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Part of DCP's protocol; a writer serves one folder only."""
        if checkpoint_id is not None and Path(checkpoint_id) != self.folder:
            raise ValueError(f"checkpoint_id {checkpoint_id} is not the writer's folder {self.folder}")

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Part of DCP's protocol."""
        self.folder.mkdir(exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse byte items: only tensors are ever stored."""
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise ValueError(f"{item.index.fqn} is not a tensor: only tensors are saved, other state goes to JSON")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Part of DCP's protocol; ranks choose their file names themselves."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items, fsync, and report file, place and CRC32 of each.

        Raises CheckpointFailed naming the file and tensor of an I/O error.
        """
        self.prepare_local_plan(plan)
        parts = _split(plan.items, self.files_per_rank)
        names = [f"rank-{self.rank:05d}{f'-{i}' if i else ''}.safetensors" for i in range(len(parts))]
        with ThreadPoolExecutor(max_workers=max(len(parts), 1)) as pool:
            jobs = [pool.submit(_write_file, self.folder / n, part, planner) for n, part in zip(names, parts)]
            results = [result for job in jobs for result in job.result()]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Coordinator: write train_state.json, then the manifest of everything, each fsynced."""
        written = {r.index: r for part in results for r in part}
        files = {r.storage_data.file.name: r.storage_data.file for r in written.values()}
        names = sorted(files)
        record = FileRecord(TRAIN_STATE, len(self.train_state), len(self.train_state), zlib.crc32(self.train_state))
        write_synced(self.folder / TRAIN_STATE, self.train_state)
        place = {name: i for i, name in enumerate(names)}
        tensors = {}
        for key, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{key} is not a tensor: only tensors are saved")
            chunks = []
            for chunk in entry.chunks:
                data = written[MetadataIndex(key, chunk.offsets)].storage_data
                box = (tuple(chunk.offsets), tuple(chunk.sizes))
                chunks.append(ChunkRecord(place[data.file.name], data.begin, *box, data.crc32))
            tensors[key] = TensorRecord(entry.properties.dtype, tuple(entry.size), tuple(chunks))
        versions = {"torch": torch.__version__, "megastage": megastage.__version__}
        manifest = Manifest(self.step, self.contents, [*(files[n] for n in names), record], tensors, versions)
        write_synced(self.folder / MANIFEST, manifest.dump())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Part of DCP's protocol."""
        return os.path.isdir(checkpoint_id)


class ManifestReader(StorageReader):
    """DCP storage reader: reads whole chunks, compares CRC32, and only then copies what the plan asks for.

    A chunk is read once per rank however many pieces of it are wanted. `threads` files are read at a time.
    """

    def __init__(self, folder: str | os.PathLike[str], *, manifest: Manifest | None = None, threads: int = 2) -> None:
        self.folder = Path(folder)
        self.manifest = manifest if manifest is not None else read_manifest(folder)
        self.threads = threads

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Part of DCP's protocol; a reader serves one folder only."""
        if checkpoint_id is not None and Path(checkpoint_id) != self.folder:
            raise ValueError(f"checkpoint_id {checkpoint_id} is not the reader's folder {self.folder}")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """DCP's Metadata of every tensor of the checkpoint."""
        return self.manifest.metadata(self.manifest.tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Part of DCP's protocol."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Refuse byte items: they would be unpickled."""
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise ValueError(f"{item.dest_index.fqn} is not a tensor: byte items are never loaded")
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Part of DCP's protocol."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Verify and copy. Raises BadCheckpoint naming file and tensor at the first byte that is not as saved."""
        self.prepare_local_plan(plan)
        wanted: dict[tuple[str, tuple[int, ...]], list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            assert item.storage_index.offset is not None
            wanted[item.storage_index.fqn, tuple(item.storage_index.offset)].append(item)
        by_file: dict[int, list[tuple[str, ChunkRecord, list[ReadItem]]]] = defaultdict(list)
        for key in dict.fromkeys(fqn for fqn, _ in wanted):
            for chunk in self.manifest.tensors[key].chunks:
                if items := wanted.get((key, chunk.offsets)):
                    by_file[chunk.file].append((key, chunk, items))
        with ThreadPoolExecutor(max_workers=self.threads) as pool:
            jobs = [pool.submit(self._read_file, number, work, planner) for number, work in sorted(by_file.items())]
            for job in jobs:
                job.result()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def verify_headers(self, files: list[int]) -> None:
        """Compare the headers of these files (by number) with the manifest."""
        for number in files:
            record = self.manifest.files[number]
            path = self.folder / record.name
            with _open(path) as file:
                header = torch.empty(record.header_bytes, dtype=torch.uint8)
                _read_chunk(file, path, 0, header, record.header_crc32, None)

    def verify_files(self, files: list[int]) -> None:
        """Compare every byte of these files with the manifest, loading nothing."""
        self.verify_headers(files)
        work: dict[int, list[tuple[str, ChunkRecord, list[ReadItem]]]] = {number: [] for number in files}
        for key, tensor in self.manifest.tensors.items():
            for chunk in tensor.chunks:
                if chunk.file in work:
                    work[chunk.file].append((key, chunk, []))
        for number, chunks in work.items():
            self._read_file(number, chunks, None)

    def _read_file(
        self, number: int, work: list[tuple[str, ChunkRecord, list[ReadItem]]], planner: LoadPlanner | None
    ) -> None:
        path = self.folder / self.manifest.files[number].name
        largest = max((self.manifest.tensors[key].chunk_bytes(chunk) for key, chunk, _ in work), default=0)
        buffer = torch.empty(largest, dtype=torch.uint8)  # one for all chunks: fresh pages cost more than the reading
        with _open(path) as file:
            for key, chunk, items in sorted(work, key=lambda w: w[1].begin):
                tensor = self.manifest.tensors[key]
                data = buffer[: tensor.chunk_bytes(chunk)]
                _read_chunk(file, path, chunk.begin, data, chunk.crc32, key)
                if planner is None:
                    continue
                source = data.view(tensor.dtype).view(chunk.sizes)
                for item in items:
                    part = source
                    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths)):
                        part = part.narrow(dim, start, length)
                    target = planner.resolve_tensor(item).detach()
                    if target.dtype != part.dtype or target.shape != part.shape:
                        raise ValueError(
                            f"{key}: {part.dtype} {part.shape} saved, {target.dtype} {target.shape} wanted"
                        )
                    target.copy_(part)
                    planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Part of DCP's protocol."""
        return os.path.isfile(Path(checkpoint_id, MANIFEST))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor (any device, any strides) in row-major order as bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def tensor_data(item: WriteItem) -> TensorWriteData:
    """The description of the shard behind a write item; every item of ours has one."""
    assert item.tensor_data is not None, f"{item.index.fqn} is not a tensor"
    return item.tensor_data


def write_synced(path: Path, data: bytes) -> None:
    """Write a new file and fsync it; an existing one is an error."""
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointFailed(f"writing {path}: {error}") from error


def _split(items: list[WriteItem], n_files: int) -> list[list[WriteItem]]:
    """Items in at most n_files lists of similar size in bytes, largest first (no empty list)."""
    parts: list[list[WriteItem]] = [[] for _ in range(n_files)]
    loads = [0] * n_files
    for item in sorted(items, key=_item_bytes, reverse=True):
        lightest = loads.index(min(loads))
        parts[lightest].append(item)
        loads[lightest] += _item_bytes(item)
    return [part for part in parts if part]


def _item_bytes(item: WriteItem) -> int:
    data = tensor_data(item)
    return data.chunk.sizes.numel() * data.properties.dtype.itemsize


def _chunk_name(item: WriteItem) -> str:
    """The key itself for a whole tensor, key[begin:end,...] for a chunk of one."""
    data = tensor_data(item)
    chunk = data.chunk
    if chunk.sizes == data.size:
        return item.index.fqn
    return f"{item.index.fqn}[{','.join(f'{o}:{o + n}' for o, n in zip(chunk.offsets, chunk.sizes))}]"


def _header(items: list[WriteItem]) -> bytes:
    """safetensors: u64 little-endian length, JSON padded with spaces so that data starts 8-byte aligned."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for item in items:
        data = tensor_data(item)
        end = position + _item_bytes(item)
        entries[_chunk_name(item)] = {
            "dtype": DTYPE_NAMES[data.properties.dtype],
            "shape": list(data.chunk.sizes),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_file(path: Path, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    """Write one safetensors file. Wider elements first, so that every tensor starts aligned to its element size."""
    items = sorted(items, key=lambda i: (-tensor_data(i).properties.dtype.itemsize, _chunk_name(i)))
    header = _header(items)
    placed: list[tuple[WriteItem, int, int]] = []
    key = None
    try:
        with open(path, "xb", buffering=0) as file:
            _write_all(file, memoryview(header))
            position = len(header)
            for item in items:
                key = item.index.fqn
                data = planner.resolve_data(item)
                if not isinstance(data, Tensor):
                    raise ValueError(f"{key} is not a tensor: only tensors are saved")
                view = tensor_bytes(data)
                assert len(view) == _item_bytes(item), f"{key}: the planner handed over another shape than planned"
                placed.append((item, position, _write_all(file, view)))
                position += len(view)
            key = None
            os.fsync(file.fileno())
    except OSError as error:
        where = f" (tensor {key})" if key else ""
        raise CheckpointFailed(f"writing {path}{where}: {error}") from error
    record = FileRecord(path.name, position, len(header), zlib.crc32(header))
    return [WriteResult(i.index, _item_bytes(i), ChunkWritten(record, begin, crc)) for i, begin, crc in placed]


def _write_all(file: Any, view: memoryview) -> int:
    """Write all of `view` and return its CRC32; a raw file may take less than it is given."""
    crc = 0
    for start in range(0, len(view), PIECE_BYTES):
        piece = view[start : start + PIECE_BYTES]
        crc = zlib.crc32(piece, crc)
        while len(piece):
            piece = piece[file.write(piece) :]
    return crc


def _open(path: Path) -> Any:
    try:
        return open_confined(path)
    except FileNotFoundError as error:
        raise BadCheckpoint(f"{path}: the file is missing", file=str(path)) from error


def _read_chunk(file: Any, path: Path, begin: int, data: Tensor, crc32: int, key: str | None) -> None:
    """Fill `data` (uint8 on the CPU) from byte `begin` on and compare its CRC32."""
    view, position, crc = memoryview(data.numpy().data), 0, 0
    what = f"tensor {key}" if key else "its header"
    file.seek(begin)
    while position < len(view):
        try:
            got = file.readinto(view[position : position + PIECE_BYTES])
        except OSError as error:
            if error.errno != errno.EIO:  # only a medium that has lost the bytes; a network may have them again later
                raise
            raise BadCheckpoint(f"{path}: reading {what}: {error}", file=str(path), tensor=key) from error
        if not got:
            raise BadCheckpoint(f"{path}: the file ends inside {what}", file=str(path), tensor=key)
        crc = zlib.crc32(view[position : position + got], crc)
        position += got
    if crc != crc32:
        raise BadCheckpoint(f"{path}: {what} is not what was saved (CRC32 differs)", file=str(path), tensor=key)
