"""Who writes and who reads what: torch.distributed.checkpoint's planners, driven over JSON instead of pickles.

Every rank describes its shards; rank 0 removes duplicates, balances, checks that ranks agree on dtype and shape and
that the chunks cover each tensor; each rank learns which of its shards to write. The global plan is kept while no
rank's description changes, so only the first save of a run pays for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from megastage.checkpoint.errors import CheckpointMismatch
from megastage.checkpoint.manifest import DTYPE_NAMES, DTYPES, Manifest
from megastage.checkpoint.storage import tensor_data
from megastage.parallel.placement import local_window


class LocalSavePlanner(DefaultSavePlanner):
    """Resolves write items from local shards by key; a key has at most one shard on a rank."""

    def __init__(self, shards: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.shards = shards

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The local shard, wherever it lives."""
        return self.shards[write_item.index.fqn]


def plan_shards(tensors: Mapping[str, Tensor]) -> tuple[list[WriteItem], dict[str, Tensor]]:
    """This rank's write items and the local shard behind each. Empty shards are left out.

    Raises ValueError naming a key that is not a dense tensor of a storable dtype.
    """
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{key} is a {type(value).__name__}: only tensors are saved, other state goes to JSON")
        if value.dtype not in DTYPE_NAMES or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{key}: a {value.layout} tensor of {value.dtype} on {value.device} cannot be saved")
    items = [item for key, value in tensors.items() if not _is_empty_shard(item := _write_item(key, value))]
    keys = {item.index.fqn for item in items}
    shards = {key: local_shard(value) for key, value in tensors.items() if key in keys}
    return items, shards


def _write_item(key: str, value: Tensor) -> WriteItem:
    chunk = _chunk(value)
    kind = WriteItemType.SHARD if isinstance(value, DTensor) else WriteItemType.TENSOR
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(local_shard(value)), value.size())
    return WriteItem(MetadataIndex(key, chunk.offsets), kind, tensor_data=data)


def _chunk(value: Tensor) -> ChunkStorageMetadata:
    """The box of the global tensor that this rank holds."""
    window = local_window(value)
    return ChunkStorageMetadata(
        torch.Size([cut.start for cut in window]), torch.Size([cut.stop - cut.start for cut in window])
    )


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a (D)Tensor that this rank holds, detached; it shares memory with the tensor."""
    with torch.no_grad():  # DTensor.to_local builds an autograd view otherwise, which must not be written to
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def items_to_json(items: Iterable[WriteItem]) -> list[Any]:
    """Write items as [key, type, dtype, global shape, chunk offsets, chunk sizes]."""
    out = []
    for item in items:
        data = tensor_data(item)
        box = [list(data.size), list(data.chunk.offsets), list(data.chunk.sizes)]
        out.append([item.index.fqn, item.type.name, DTYPE_NAMES[data.properties.dtype], *box])
    return out


def items_from_json(rows: Iterable[Any]) -> list[WriteItem]:
    """The inverse of items_to_json."""
    items = []
    for key, kind, dtype, shape, offsets, sizes in rows:
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        data = TensorWriteData(chunk, TensorProperties(dtype=DTYPES[dtype]), torch.Size(shape))
        items.append(WriteItem(MetadataIndex(key, offsets), WriteItemType[kind], tensor_data=data))
    return items


def items_digest(items: Iterable[WriteItem]) -> str:
    """A digest that changes whenever a rank's description of its shards does."""
    return hashlib.sha256(json.dumps(items_to_json(items)).encode()).hexdigest()


class GlobalPlan:
    """Rank 0's view of a save: which item of which rank is written, and DCP's Metadata of the whole.

    `writers[r]` lists the positions in rank r's items that it writes; all its other items are copies of chunks that
    another rank writes.
    """

    def __init__(self, items_of_ranks: list[list[WriteItem]]) -> None:
        _check_ranks_agree(items_of_ranks)
        planner: SavePlanner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        plans, self.metadata = planner.create_global_plan([SavePlan(items) for items in items_of_ranks])
        self.writers: list[list[int]] = []
        for items, plan in zip(items_of_ranks, plans):
            kept = {item.index for item in plan.items}
            self.writers.append([i for i, item in enumerate(items) if item.index in kept])


def _is_empty_shard(item: WriteItem) -> bool:
    data = tensor_data(item)
    return data.chunk.sizes.numel() == 0 and data.size.numel() > 0


def _check_ranks_agree(items_of_ranks: list[list[WriteItem]]) -> None:
    """DCP takes the first rank's word for dtype and shape; here a different word of another rank is an error."""
    first: dict[str, tuple[int, WriteItem]] = {}
    for rank, items in enumerate(items_of_ranks):
        for item in items:
            other_rank, other = first.setdefault(item.index.fqn, (rank, item))
            mine, theirs = tensor_data(item), tensor_data(other)
            for name, a, b in (
                ("dtype", theirs.properties.dtype, mine.properties.dtype),
                ("shape", tuple(theirs.size), tuple(mine.size)),
                ("kind", other.type.name, item.type.name),
            ):
                if a != b:
                    raise ValueError(f"{item.index.fqn}: {name} is {a} on rank {other_rank} and {b} on rank {rank}")


class StrictLoadPlanner(DefaultLoadPlanner):
    """DCP's load planner behind checks that leave it nothing to guess."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.shards: dict[str, Tensor] = {}

    def plan(self, tensors: Mapping[str, Tensor], manifest: Manifest) -> LoadPlan:
        """What this rank reads to fill `tensors`. Raises CheckpointMismatch listing every key that does not fit."""
        problems = mismatches(tensors, manifest)
        if problems:
            raise CheckpointMismatch("\n".join(problems), problems)
        metadata = manifest.metadata(tensors)
        self.set_up_planner(dict(tensors), metadata, is_coordinator=False)
        plan = LoadPlan(
            [
                item
                for key, value in tensors.items()
                for item in create_read_items_for_chunk_list(key, _stored(metadata, key), [_chunk(value)])
            ]
        )
        self.shards = {key: local_shard(value) for key, value in tensors.items()}
        _check_filled(self.shards, plan.items)
        return plan

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The local shard to read into; a key has at most one on a rank."""
        return self.shards[index.fqn]


def _stored(metadata: Metadata, key: str) -> TensorStorageMetadata:
    stored = metadata.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata), key
    return stored


def mismatches(tensors: Mapping[str, Tensor], manifest: Manifest) -> list[str]:
    """One line for each tensor of this rank that the checkpoint does not hold in the same dtype and global shape."""
    problems = []
    for key, value in tensors.items():
        saved = manifest.tensors.get(key)
        if not isinstance(value, Tensor):
            problems.append(f"{key}: the run has a {type(value).__name__}, only tensors are loaded")
        elif value.is_meta:
            problems.append(f"{key}: the run's tensor has no memory yet (meta device)")
        elif saved is None:
            problems.append(f"{key}: missing in the checkpoint (the run has {value.dtype} {tuple(value.shape)})")
        elif saved.shape != tuple(value.shape):
            problems.append(f"{key}: shape {saved.shape} in the checkpoint, {tuple(value.shape)} in the run")
        elif saved.dtype != value.dtype:
            problems.append(f"{key}: dtype {saved.dtype} in the checkpoint, {value.dtype} in the run (no silent cast)")
    return problems


def name_matcher(names: Iterable[str]) -> Callable[[str], bool]:
    """Whether a key is one of `names` or lies below one of them (`model` matches `model.norm.weight`)."""
    exact = {name.rstrip(".") for name in names}
    heads = tuple(f"{name}." for name in exact)
    return lambda key: key in exact or key.startswith(heads)


def _check_filled(shards: Mapping[str, Tensor], items: list[ReadItem]) -> None:
    """Every element of every local shard is read once, judged by volume: DCP leaves what no chunk covers as it was."""
    volume = dict.fromkeys(shards, 0)
    for item in items:
        volume[item.dest_index.fqn] += item.lengths.numel()
    for key, shard in shards.items():
        if volume[key] != shard.numel():
            raise ValueError(f"{key}: the checkpoint holds {volume[key]} of {shard.numel()} elements of a rank's shard")
