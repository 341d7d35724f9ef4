"""Real ranks: what one layout saved, another loads bit for bit."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sharded_states import expected, finish, start, training_tensors, wrong_keys
from torch.distributed.device_mesh import init_device_mesh

from megastage.checkpoint.manager import CheckpointManager
from megastage.checkpoint.manifest import read_manifest
from ranks import run_ranks

pytestmark = pytest.mark.dist


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
