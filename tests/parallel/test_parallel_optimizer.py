"""The kernel in the optimizer's place: torch's numbers, and bf16 storage whose copies stay equal on every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from training import TINY, layout_flags, train, write_nanoset

from megastage.optim import Kernel, Optimizer
from ranks import run_ranks

pytestmark = pytest.mark.dist


def _optimizer(parameters: dict[str, nn.Parameter], kernel: Kernel | None) -> Optimizer:
    return Optimizer(
        parameters, name="AdamW", lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, implementation="fused",
        kernel=kernel,
    )  # fmt: skip


def test_torchs_numbers_through_resets_and_resumes():
    ours, theirs = (
        {name: nn.Parameter(torch.arange(float(n)) / n - 0.3) for name, n in (("a", 7), ("empty", 0), ("b", 12))}
        for _ in range(2)
    )
    kernel = Kernel("torch", False, 0, lambda name: name)
    pairs = [(ours, _optimizer(ours, kernel)), (theirs, _optimizer(theirs, None))]
    scale = torch.tensor(0.5)
    for step in range(6):
        for parameters, optimizer in pairs:
            for name, p in parameters.items():
                generator = torch.Generator().manual_seed(step + len(name))
                p.grad = torch.randn(p.shape, generator=generator)
            if step == 3:
                optimizer.reset()
            optimizer.step(1e-2 / (step + 1), 0.1, scale)
            if step == 4:  # what a resume does: fill the state in place, then set the count
                for tensor in optimizer.state_tensors().values():
                    tensor.mul_(0.5)
                optimizer.set_steps(9)
        for name, p in ours.items():
            torch.testing.assert_close(p, theirs[name], rtol=2e-6, atol=1e-7)
    assert pairs[0][1].steps == pairs[1][1].steps == 10


def test_small_updates_of_bf16_parameters_are_kept_on_average():
    parameters = {"a": nn.Parameter(torch.full((4096,), 1.0, dtype=torch.bfloat16))}
    optimizer = _optimizer(parameters, Kernel("torch", True, 3, lambda name: name))
    for _ in range(20):
        parameters["a"].grad = torch.ones_like(parameters["a"])
        optimizer.step(1e-4, 0.0)  # a fortieth of half a bf16 step below 1
    assert 1 - parameters["a"].float().mean().item() == pytest.approx(20e-4, rel=0.1)


def _train_and_compare(argv: list[str]) -> dict[str, np.ndarray]:
    """Train, then this rank's shards by name and window of the whole parameter."""
    import pretrain
    from megastage import trainer
    from megastage.parallel.placement import local_window

    kept: dict[str, np.ndarray] = {}
    original = trainer.Trainer.close

    def close(self: trainer.Trainer) -> None:
        for name, p in self.model.parameters.items():
            assert isinstance(p, DTensor)
            kept[f"{name} {local_window(p)}"] = p.to_local().detach().float().numpy().copy()
        original(self)

    trainer.Trainer.close = close  # type: ignore[method-assign]
    assert pretrain.main(argv) == 0
    assert not dist.is_initialized()
    return kept


@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2}, {"rep": 2, "dp": 2}], ids=["tp2pp2", "rep2dp2"])
def test_copies_of_bf16_parameters_stay_equal(layout, tmp_path):
    data = write_nanoset(tmp_path / "web", 20_000, 1)
    argv = [
        "--job.dump_folder", str(tmp_path / "out"), "--training.dataset_type", "nanoset", "--training.dataset_path",
        str(data), "--training.steps", "4", "--training.seq_len", "64", "--training.global_batch_size", "4",
        "--training.local_batch_size", "1", *TINY, "--model.tied_embeddings", "--training.dtype", "bfloat16",
        *layout_flags(**layout),
    ]  # fmt: skip
    seen: dict[str, np.ndarray] = {}
    copies = 0
    for rank in run_ranks(4, _train_and_compare, argv):
        for where, values in rank.items():
            if where in seen:
                copies += 1
                np.testing.assert_array_equal(values, seen[where], err_msg=where)
            seen[where] = values
    assert copies > 4  # norms over tensor parallelism and the tied table, or whole replicas


def test_a_bf16_run_learns_like_one_in_fp32(tmp_path):
    data = write_nanoset(tmp_path / "web", 20_000, 1)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        argv = [
            "--job.dump_folder", str(tmp_path / dtype), "--training.dataset_type", "nanoset", "--training.dataset_path",
            str(data), "--training.steps", "12", "--training.seq_len", "64", "--training.global_batch_size", "8", *TINY,
            "--training.dtype", dtype,
        ]  # fmt: skip
        losses[dtype] = [record["loss"] for record in train(1, argv)]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["float32"][-1] < losses["float32"][0] - 0.1
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
