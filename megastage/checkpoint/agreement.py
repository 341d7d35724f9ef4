"""Agreement between ranks: small JSON values over a gloo group, sent as uint8 tensors.

Object collectives of torch.distributed pickle what they send; here nothing but JSON ever passes between ranks.
"""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from megastage.checkpoint.errors import BadCheckpoint, CheckpointFailed, CheckpointMismatch

MAX_SHOWN = 8  # problems spelled out in one error message


@dataclass(frozen=True)
class Failure:
    """An exception of one rank in a form that can be sent to the others."""

    kind: str  # "failed", "bad", "value" or "mismatch"
    message: str
    file: str = ""
    tensor: str | None = None
    rank: int = 0
    host: str = ""


def describe(error: BaseException, rank: int) -> Failure:
    """The failure that stands for `error` on this rank."""
    host = socket.gethostname()
    if isinstance(error, BadCheckpoint):
        return Failure("bad", str(error), error.file, error.tensor, rank, host)
    if isinstance(error, CheckpointMismatch):
        return Failure("mismatch", "\n".join(error.problems), rank=rank, host=host)
    if isinstance(error, ValueError):
        return Failure("value", str(error), rank=rank, host=host)
    text = str(error) if isinstance(error, CheckpointFailed) else f"{type(error).__name__}: {error}"
    return Failure("failed", text, str(getattr(error, "filename", None) or ""), None, rank, host)


class Ranks:
    """JSON collectives over `group` (a gloo group), or of this process alone when `group` is None.

    Every method must be called by all ranks of the group in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError("group is None in a job of several ranks: give a gloo process group of all ranks")
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of the group, which decides and writes the manifest."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's value in rank order on rank 0, None elsewhere."""
        if self.size == 1:
            return [value]
        data = _encode(value)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([data.numel()]), group=self.group)
        longest = int(max(int(n) for n in lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: data.numel()] = data
        received = [torch.empty_like(padded) for _ in range(self.size)] if self.is_main else None
        dist.gather(padded, received, group=self.group, group_dst=0)
        if received is None:
            return None
        return [_decode(part[: int(n)]) for part, n in zip(received, lengths)]

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        data = _encode(value) if self.is_main else torch.empty(0, dtype=torch.uint8)
        length = torch.tensor([data.numel()])
        dist.broadcast(length, group=self.group, group_src=0)
        buffer = data if self.is_main else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(buffer, group=self.group, group_src=0)
        return _decode(buffer)

    def scatter(self, values: list[Any] | None = None) -> Any:
        """Value r of rank 0's list on rank r."""
        if self.size == 1:
            assert values is not None
            return values[0]
        parts = [_encode(v) for v in values] if values is not None else []
        shape = torch.tensor([max((p.numel() for p in parts), default=0)])
        dist.broadcast(shape, group=self.group, group_src=0)
        out = torch.empty(int(shape) + 8, dtype=torch.uint8)
        rows = None
        if self.is_main:
            rows = []
            for part in parts:
                row = torch.zeros(int(shape) + 8, dtype=torch.uint8)
                row[:8] = torch.tensor([part.numel()]).view(torch.uint8)
                row[8 : 8 + part.numel()] = part
                rows.append(row)
        dist.scatter(out, rows, group=self.group, group_src=0)
        length = int(out[:8].clone().view(torch.int64))
        return _decode(out[8 : 8 + length])

    def union(self, flags: Tensor) -> Tensor:
        """Element-wise maximum of `flags` (uint8, same length everywhere) over all ranks, in place."""
        if self.size > 1 and flags.numel():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        return flags

    def agree(self, error: BaseException | None) -> None:
        """Raise the same exception on every rank if any rank brought one; return on every rank otherwise."""
        gathered = self.gather(None if error is None else asdict(describe(error, self.rank)))
        found = None if gathered is None else [f for f in gathered if f is not None]
        failures = [Failure(**f) for f in self.broadcast(found)]
        if failures:
            raise_together(failures, error)


def raise_together(failures: list[Failure], cause: BaseException | None = None) -> NoReturn:
    """Raise one exception that speaks for all failures: the gravest kind first."""
    for kind in ("failed", "bad", "value", "mismatch"):
        chosen = [f for f in failures if f.kind == kind]
        if chosen:
            break
    first = chosen[0]
    if first.kind == "mismatch":
        problems = list(dict.fromkeys(p for f in chosen for p in f.message.split("\n")))
        raise CheckpointMismatch(_many("the checkpoint does not fit this run:", problems), problems) from cause
    messages = list(dict.fromkeys(f.message for f in chosen))
    if first.kind == "value":
        raise ValueError(_many("", messages)) from cause
    if first.kind == "bad":
        raise BadCheckpoint(_many("", messages), file=first.file, tensor=first.tensor) from cause
    raise CheckpointFailed(_many("", [f"rank {f.rank} on {f.host}: {f.message}" for f in chosen])) from cause


def _many(head: str, lines: list[str]) -> str:
    shown = lines[:MAX_SHOWN]
    if len(lines) > len(shown):
        shown.append(f"... and {len(lines) - MAX_SHOWN} more")
    return "\n  ".join(([head] if head else []) + shown)


def _encode(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value, separators=(",", ":")).encode()), dtype=torch.uint8)


def _decode(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
