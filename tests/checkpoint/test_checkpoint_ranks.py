"""Real ranks: resharding, pipeline keys, failures of one rank, background saves beside training's collectives."""

import logging
import os
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from megastage.checkpoint import storage
from megastage.checkpoint.errors import BadCheckpoint, CheckpointFailed, CheckpointMismatch
from megastage.checkpoint.manager import CheckpointManager
from megastage.checkpoint.manifest import read_manifest
from megastage.optim import Optimizer
from ranks import run_ranks

pytestmark = pytest.mark.dist
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


def _reshard(root: str) -> list[str]:
    group = start()

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle between ranks")

    dist.distributed_c10d._object_to_tensor = forbidden
    dist.distributed_c10d._tensor_to_object = forbidden
    manager = CheckpointManager(root, group=group)
    two_by_two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tensors = training_tensors(two_by_two, fill=True)
    assert wrong_keys(tensors, two_by_two) == []
    manager.save(1, tensors, {"step": 1})
    wrong = []
    for shape in ((2, 2), (4, 1), (1, 4)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        out = training_tensors(mesh, fill=False)
        assert manager.load(1, out) == {"step": 1}
        wrong += [f"{shape} {key}" for key in wrong_keys(out, mesh)]
    # and back again from another layout
    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "tp"))
    manager.save(2, training_tensors(mesh, fill=True), {"step": 2})
    out = training_tensors(two_by_two, fill=False)
    manager.load(2, out)
    wrong += [f"1x4 -> 2x2 {key}" for key in wrong_keys(out, two_by_two)]
    manager.verify(2)
    finish()
    return wrong


def test_resharding_is_bit_exact_and_no_pickle_passes_between_ranks(tmp_path: Path) -> None:
    assert run_ranks(4, _reshard, str(tmp_path)) == [[]] * 4
    one = CheckpointManager(tmp_path)
    for step in (1, 2):
        out = {k: torch.zeros_like(v) for k, v in expected().items()}
        one.load(step, out)
        assert wrong_keys(out) == []
    tensors = read_manifest(tmp_path / "step-1").tensors
    # 1025 rows over 2x2: 4 chunks of rows, the uneven ones included; a replicated norm is only split over dp
    assert [c.sizes for c in tensors["model.col1025.weight"].chunks] == [(257, 6), (256, 6), (256, 6), (256, 6)]
    assert sorted(c.sizes for c in tensors["model.norm9.weight"].chunks) == [(4,), (5,)]
    n_bytes = [p.stat().st_size for p in (tmp_path / "step-1").glob("rank-*")]
    assert len(n_bytes) == 4
    assert sum(n_bytes) < 1.5 * sum(v.numel() * 4 for v in expected().values())  # each chunk once


def _three_by_two(root: str) -> list[str]:
    manager = CheckpointManager(root, group=start())
    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
    tensors = training_tensors(mesh, fill=True)
    manager.save(1, tensors, {"step": 1})
    out = training_tensors(mesh, fill=False)
    manager.load(1, out)
    wrong = [*wrong_keys(tensors, mesh), *wrong_keys(out, mesh)]
    finish()
    return wrong


def test_rows_that_three_ranks_cut_unevenly(tmp_path: Path) -> None:
    """13 rows over tp 2 are 7 and 6; over dp 3 these are 3, 3, 1 and 2, 2, 2: the last data rank has 1 and 2."""
    assert run_ranks(6, _three_by_two, str(tmp_path)) == [[]] * 6
    chunks = read_manifest(tmp_path / "step-1").tensors["model.col13.weight"].chunks
    assert sorted((c.offsets[0], c.sizes[0]) for c in chunks) == [(0, 3), (3, 3), (6, 1), (7, 2), (9, 2), (11, 2)]
    out = {k: torch.zeros_like(v) for k, v in expected().items()}
    CheckpointManager(tmp_path).load(1, out)
    assert wrong_keys(out) == []


def test_one_rank_to_many(tmp_path: Path) -> None:
    CheckpointManager(tmp_path).save(3, expected(), {"step": 3})
    assert run_ranks(4, _load_two_by_two, str(tmp_path)) == [[]] * 4


def _load_two_by_two(root: str) -> list[str]:
    manager = CheckpointManager(root, group=start())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    out = training_tensors(mesh, fill=False)
    found = manager.load_newest(out)
    assert found == (3, {"step": 3})
    wrong = wrong_keys(out, mesh)
    finish()
    return wrong


def message(call, *args: object, kind: type[Exception] = CheckpointFailed, **kwargs: object) -> str:
    try:
        call(*args, **kwargs)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def _failures(root: str) -> list[str]:
    """What each rank is told when one rank goes wrong; every case on the same ranks, so nothing may hang or linger."""
    group = start()
    rank = dist.get_rank()
    told = []
    for mode in ("disabled", "async"):
        manager = CheckpointManager(f"{root}/{mode}", group=group, async_mode=mode)

        def save(step: int, tensors: dict[str, torch.Tensor], manager: CheckpointManager = manager) -> None:
            manager.save(step, tensors, {"step": step})
            manager.wait()

        mine = {f"model.{rank}": torch.full((50,), float(rank)), "model.shared": torch.ones(4)}
        save(1, mine)
        real = os.fsync
        if rank == 2:
            storage.os.fsync = lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        told.append(message(save, 2, mine))
        storage.os.fsync = real
        told.append(message(save, 2, {**mine, "model.shared": torch.full((4,), float(rank == 1))}))
        told.append(message(save, 2, {**mine, "model.shared": torch.ones(4 + rank)}))
        told.append(
            message(save, 2, {**mine, "model.shared": torch.ones(4, dtype=[torch.float32, torch.float64][rank % 2])})
        )
        told.append(message(save, 2, {**mine, "bad": 1} if rank == 3 else mine))
        save(5, mine)
        told.append(str(manager.steps()))
        out = {k: torch.zeros_like(v) for k, v in mine.items()}
        if rank == 1:
            out["model.1"] = torch.zeros(51)
        if rank == 3:
            del out["model.3"]
        told.append(message(manager.load, 5, out, kind=CheckpointMismatch))
        out["model.1" if rank == 1 else f"model.{rank}"] = torch.zeros(50)
        if rank == 3:
            del out["model.3"]
        told.append(message(manager.load, 5, out, kind=CheckpointMismatch))
        dist.barrier()
        if rank == 0:
            path = Path(root, mode, "step-5", "rank-00002.safetensors")
            data = bytearray(path.read_bytes())
            data[-3] ^= 1
            path.write_bytes(data)
        dist.barrier()
        told.append(message(manager.load, 5, {k: torch.zeros_like(v) for k, v in mine.items()}, kind=BadCheckpoint))
        out = {k: torch.zeros_like(v) for k, v in mine.items()}
        found = manager.load_newest(out)
        told.append(f"{found} {all(torch.equal(out[k], mine[k]) for k in mine)} {manager.steps()}")
    finish()
    return told


def test_one_ranks_trouble_is_told_to_all_and_leaves_nothing_behind(tmp_path: Path) -> None:
    logging.disable(logging.ERROR)
    told = run_ranks(4, _failures, str(tmp_path))
    logging.disable(logging.NOTSET)
    assert told[0] == told[1] == told[2] == told[3]
    assert told[0][:10] == [t.replace("/async/", "/disabled/") for t in told[0][10:]]
    disk, drift, shape, dtype, junk, steps, mismatch, unknown, bad, fallback = told[0][:10]
    assert "step-2 was not saved: rank 2 on " in disk
    assert "step-2.tmp/rank-00002.safetensors: [Errno 28] No space left on device" in disk
    assert "model.shared: ranks " in drift
    assert "different values" in drift
    assert "model.shared: shape is (4,) on rank 0 and (5,) on rank 1" in shape
    assert "model.shared: dtype is torch.float32 on rank 0 and torch.float64 on rank 1" in dtype
    assert "rank 3 on " in junk
    assert "bad is a int: only tensors are saved" in junk
    assert steps == "[1, 5]"
    assert "model.1: shape (50,) in the checkpoint, (51,) in the run" in mismatch
    assert "model.3: unknown to the run (the checkpoint has torch.float32 (50,))" in unknown
    assert "step-5/rank-00002.safetensors: tensor model.2 is not what was saved" in bad
    assert fallback == "(1, {'step': 1}) True [1]"
    assert sorted(p.name for p in (tmp_path / "async").iterdir()) == ["latest", "step-1", "step-5.bad-1"]


def _pipeline(root: str) -> list[str]:
    """Two pipeline ranks of two data ranks each; the embedding is tied and lives on both."""
    manager = CheckpointManager(root, group=start())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage, data_rank = mesh["pp"].get_local_rank(), mesh["dp"].get_local_rank()
    values = {f"model.{n}": truth(n, (5, 3)) for n in ("tok.weight", f"layers.{stage}.w", f"layers.{stage + 2}.w")}
    manager.save(1, {k: distribute_tensor(v, mesh["dp"], [Shard(0)]) for k, v in values.items()}, {})
    out = {k: distribute_tensor(torch.zeros(5, 3), mesh["dp"], [Shard(0)]) for k in values}
    manager.load(1, out)
    wrong = [k for k, v in values.items() if not torch.equal(out[k].to_local(), split(v, 2, 0, data_rank))]
    finish()
    return wrong


def test_each_pipeline_rank_has_keys_of_its_own(tmp_path: Path) -> None:
    assert run_ranks(4, _pipeline, str(tmp_path)) == [[]] * 4
    tensors = read_manifest(tmp_path / "step-1").tensors
    assert sorted(tensors) == [*(f"model.layers.{i}.w" for i in range(4)), "model.tok.weight"]
    assert [c.sizes for c in tensors["model.tok.weight"].chunks] == [(3, 3), (2, 3)]
    one = {k: torch.zeros(5, 3) for k in tensors}
    CheckpointManager(tmp_path).load(1, one)
    assert all(torch.equal(v, truth(k.removeprefix("model."), (5, 3))) for k, v in one.items())


def _beside_training(root: str) -> tuple[int, float, list[int]]:
    group = start()
    rank = dist.get_rank()
    real = storage._write_all

    def slow(file, view):
        time.sleep(0.01)
        return real(file, view)

    storage._write_all = slow
    manager = CheckpointManager(root, group=group, async_mode="async", keep_latest_k=0)
    weight = torch.zeros(1000)
    overlapped = 0
    for step in range(1, 61):
        gradient = torch.full((1000,), float(rank + step))
        dist.all_reduce(gradient)
        weight += gradient
        if step % 6 == 0:
            manager.save(step, {"model.w": weight, f"model.{rank}": weight * rank}, {"step": step})
        overlapped += manager._thread is not None and manager._thread.is_alive()
    manager.close()
    finish()
    return overlapped, float(weight[0]), manager.steps() if rank == -1 else []


def test_background_saves_beside_training_collectives(tmp_path: Path) -> None:
    results = run_ranks(3, _beside_training, str(tmp_path))
    final = sum(3 * s + 3 for s in range(1, 61))
    assert all(overlapped > 5 and weight == final for overlapped, weight, _ in results)
    one = CheckpointManager(tmp_path)
    assert one.steps() == list(range(6, 61, 6))
    for step in one.steps():
        out = {"model.w": torch.zeros(1000), **{f"model.{r}": torch.zeros(1000) for r in range(3)}}
        one.load(step, out)
        value = sum(3 * s + 3 for s in range(1, step + 1))
        assert all((out[f"model.{r}"] == value * r).all() for r in range(3))
        assert (out["model.w"] == value).all()


def _fsdp_run(root: str, seed: int, steps: range, resume: bool) -> list[float]:
    """A small FSDP2 run that validates (forward only) right before it saves, as a trainer does."""
    manager = CheckpointManager(root, group=start(), async_mode="async")
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))
    fully_shard(model[0])
    fully_shard(model, reshard_after_forward=False)
    for module in (model[0], model):
        module.set_force_sum_reduction_for_comms(True)
    optimizer = adamw(model)
    tensors = all_tensors(model, optimizer)
    if resume:
        found = manager.load_newest(tensors)
        assert found is not None
        assert found[0] == steps.start
        optimizer.set_steps(found[1]["step"])
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        loss = (model(torch.randn(4, 7, generator=generator)) - 1).square().mean()
        loss.backward()
        optimizer.step(lr=0.1, weight_decay=0.1)
        losses.append(loss.item())
        with torch.no_grad():
            model(torch.ones(1, 7))
        if step == 3:
            manager.save(step + 1, tensors, {"step": optimizer.steps})
    manager.close()
    finish()
    return losses


def test_an_fsdp_run_goes_on_bit_for_bit_from_a_background_save(tmp_path: Path) -> None:
    straight = run_ranks(2, _fsdp_run, str(tmp_path), 1, range(8), False)
    resumed = run_ranks(2, _fsdp_run, str(tmp_path), 2, range(4, 8), True)
    assert resumed == [losses[4:] for losses in straight]
    assert straight[0] != straight[1]


def _not_shared(root: str) -> str:
    import megastage.checkpoint.manager as module

    group = start()
    module.SHARED_FOLDER_PATIENCE_S = 0.3
    mine = root if dist.get_rank() != 1 else root + "-other-node"
    told = message(CheckpointManager, mine, group=group)
    finish()
    return told


def test_a_folder_that_is_not_shared_is_an_error_at_start(tmp_path: Path) -> None:
    (tmp_path / "ck-other-node").mkdir()
    told = run_ranks(2, _not_shared, str(tmp_path / "ck"))
    assert told[0] == told[1]
    assert "rank 1 on " in told[0]
    assert "ck-other-node is not shared" in told[0]
    assert list((tmp_path / "ck").iterdir()) == []


def test_several_ranks_without_a_group_are_an_error(tmp_path: Path) -> None:
    told = run_ranks(2, _no_group, str(tmp_path))
    assert all("give a gloo process group of all ranks" in t for t in told)


def _no_group(root: str) -> str:
    start()
    told = message(CheckpointManager, root, kind=ValueError)
    finish()
    return told


def _train_until_killed(root: str) -> None:
    group = start()
    manager = CheckpointManager(root, group=group, keep_latest_k=2, async_mode="async")
    rank = dist.get_rank()
    out = {"model.all": torch.zeros(300), f"model.{rank}": torch.zeros(300)}
    found = manager.load_newest(out)
    step = found[0] if found else 0
    assert all((v == step).all() for v in out.values())
    start_s = time.monotonic()
    victim = step % dist.get_world_size()
    while True:
        step += 1
        manager.save(step, {k: torch.full((300,), float(step)) for k in out}, {"step": step})
        if rank == victim and time.monotonic() - start_s > 0.05 + 0.01 * (step % 7):
            os._exit(9)


@pytest.mark.slow
def test_killing_one_rank_of_many_leaves_a_good_newest(tmp_path: Path) -> None:
    logging.disable(logging.WARNING)
    newest = 0
    for _ in range(12):
        with pytest.raises(RuntimeError, match=r"died without a result|was not saved"):
            run_ranks(3, _train_until_killed, str(tmp_path), timeout_s=60)
        out = {"model.all": torch.zeros(300), **{f"model.{r}": torch.zeros(300) for r in range(3)}}
        found = CheckpointManager(tmp_path).load_newest(out)
        assert found is not None
        assert found[0] > newest
        newest = found[0]
        assert all((v == newest).all() for v in out.values())
    logging.disable(logging.NOTSET)
