"""Parameters and moments cut by tensor and data parallelism, whose values follow from their names alone."""

from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megastage.optim import Optimizer

ROWS = (9, 11, 13, 1025)


def start() -> dist.ProcessGroup:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=60))


def finish() -> None:
    dist.barrier()
    dist.destroy_process_group()


def truth(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The value of a parameter, from its name alone (numpy; nothing of the code under test)."""
    seed = sum(ord(c) * (i + 1) for i, c in enumerate(name))
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


SHAPES = {f"{kind}{n}.weight": shape for n in ROWS for kind, shape in
          (("col", (n, 6)), ("row", (6, n)), ("norm", (n,)))}  # fmt: skip


def sharded_model(mesh: DeviceMesh, fill: bool) -> nn.Module:
    """Column-, row-parallel and replicated weights as DTensors on tp, then FSDP2 over dp: rows split twice."""
    model = nn.Module()
    placements = {"col": [Shard(0)], "row": [Shard(1)], "nor": [Replicate()]}
    for name, shape in SHAPES.items():
        layer = nn.Module()
        value = truth(name, shape) if fill else torch.zeros(shape)
        placed = distribute_tensor(value, mesh["tp"], placements[name[:3]])
        layer.register_parameter("weight", nn.Parameter(placed))
        model.add_module(name.split(".")[0], layer)
    fully_shard(model, mesh=mesh["dp"])
    return model


def adamw(model: nn.Module) -> Optimizer:
    return Optimizer(
        dict(model.named_parameters()), name="AdamW", lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
        implementation="fused",
    )  # fmt: skip


def all_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {**{f"model.{name}": p for name, p in model.named_parameters()}, **optimizer.state_tensors()}


def training_tensors(mesh: DeviceMesh, fill: bool) -> dict[str, torch.Tensor]:
    model = sharded_model(mesh, fill)
    tensors = all_tensors(model, adamw(model))
    if fill:
        for key, value in tensors.items():
            name = key.split("exp_avg.")[-1].split("exp_avg_sq.")[-1]
            if "exp_avg" in key:
                value.copy_(tensors[f"model.{name}"] * (3 if "_sq" in key else 2))
    return tensors


def expected() -> dict[str, torch.Tensor]:
    out = {}
    for name, shape in SHAPES.items():
        for prefix, factor in (("model.", 1), ("optimizer.exp_avg.", 2), ("optimizer.exp_avg_sq.", 3)):
            out[prefix + name] = truth(name, shape) * factor
    return out


def split(value: torch.Tensor, n: int, dim: int, part: int) -> torch.Tensor:
    """Part of n as torch.chunk cuts it: equal but for the last ones, which may be short or empty."""
    size = -(-value.shape[dim] // n)
    start = min(part * size, value.shape[dim])
    return value.narrow(dim, start, min(size, value.shape[dim] - start))


def wrong_keys(tensors: dict[str, torch.Tensor], mesh: DeviceMesh | None = None) -> list[str]:
    """Keys whose values on this rank are not those cut from the truth: first over tp, then the rows of that over dp."""
    want = expected()
    assert tensors.keys() == want.keys()
    wrong = []
    for key, value in want.items():
        if mesh is not None:
            kind = key.split(".")[-2][:3]
            if kind != "nor":
                value = split(value, mesh["tp"].size(), {"col": 0, "row": 1}[kind], mesh["tp"].get_local_rank())
            value = split(value, mesh["dp"].size(), 0, mesh["dp"].get_local_rank())
        tensor = tensors[key]
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not torch.equal(local, value) and (local.numel() or value.numel()):  # an empty shard has no values
            wrong.append(key)
    return wrong
