"""Real ranks: pipeline keys, failures of one rank, background saves beside training's collectives."""

import logging
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sharded_states import adamw, all_tensors, finish, split, start, truth
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from megastage.checkpoint import storage
from megastage.checkpoint.errors import BadCheckpoint, CheckpointFailed, CheckpointMismatch
from megastage.checkpoint.manager import CheckpointManager
from megastage.checkpoint.manifest import read_manifest
from ranks import run_ranks

pytestmark = pytest.mark.dist


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
