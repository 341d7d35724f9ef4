"""Bytes between the ranks of a CPU process group, as uint8 tensors: no pickle, no shared files. None is one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def rank_of(group: Group) -> int:
    """This process's number in the group."""
    return 0 if group is None else dist.get_rank(group)


def broadcast_bytes(content: bytes, group: Group) -> bytes:
    """What rank 0 of the group passed, on every rank (`content` of the others is not used)."""
    if group is None:
        return content
    source = dist.get_global_rank(group, 0)
    size = torch.tensor([len(content)])
    dist.broadcast(size, source, group=group)
    buffer = _tensor(content) if rank_of(group) == 0 else torch.empty(int(size), dtype=torch.uint8)
    if buffer.numel():
        dist.broadcast(buffer, source, group=group)
    return buffer.numpy().tobytes()


def gather_bytes(content: bytes, group: Group) -> list[bytes]:
    """What every rank passed, by rank, on every rank. Costs 8 bytes a rank when all pass nothing."""
    if group is None:
        return [content]
    ranks = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([len(content)]), group=group)
    longest = int(max(sizes))
    if longest == 0:
        return [b""] * ranks
    buffers = [torch.empty(longest, dtype=torch.uint8) for _ in range(ranks)]
    dist.all_gather(buffers, _tensor(content.ljust(longest, b"\0")), group=group)
    return [buffer.numpy().tobytes()[: int(size)] for buffer, size in zip(buffers, sizes)]


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
