"""N updates, a kill, a resume and N updates are 2N updates, bit for bit; another layout reads the same samples."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from training import TINY, layout_flags, records, train, write_nanoset

from ranks import run_ranks

pytestmark = pytest.mark.dist

STAGES = """
[training]
dataset_type = "nanoset"
dataset_folders = ["{0}", "{1}"]
dataset_weights = [0.7, 0.3]
steps = 8
seq_len = 128
global_batch_size = 4
local_batch_size = 1

[checkpoint]
enable = true
interval = 1
keep_latest_k = 0

[[training.data_stages]]
name = "first"
start_step = 0
end_step = 4

[[training.data_stages]]
name = "second"
start_step = 4
dataset_weights = [0.2, 0.8]
seq_len = 256
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    folders = [write_nanoset(root / name, 60_000, i) for i, name in enumerate(("web", "books"))]
    path = root / "run.toml"
    path.write_text(STAGES.format(*folders))
    return path


def _argv(config: Path, out: Path, layout: dict[str, int] | None = None, *more: str) -> list[str]:
    flags = layout_flags(**(layout or {}))
    return ["--config", str(config), "--job.dump_folder", str(out), *TINY, *flags, *more]


@pytest.fixture(scope="module")
def uncut(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight updates without a break, per layout."""
    root = tmp_path_factory.mktemp("uncut")
    for name, world, layout in (("one", 1, {}), ("many", 4, {"tp": 2, "pp": 2})):
        train(world, _argv(config, root / name, layout))
    return {name: root / name for name in ("one", "many")}


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """All shards of a checkpoint, by file and key."""
    return {f"{f.name}:{k}": v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def _cut_after(full: Path, out: Path, step: int) -> None:
    """A run folder as it was when `step` updates were done."""
    (out / "checkpoint").mkdir(parents=True)
    shutil.copytree(full / "checkpoint" / f"step-{step}", out / "checkpoint" / f"step-{step}")
    lines = (full / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[: step + 1]))  # the kill came an update after the save


@pytest.mark.parametrize("step", [3, 4, 5], ids=["within", "boundary", "after"])
@pytest.mark.parametrize(("name", "world", "layout"), [("one", 1, {}), ("many", 4, {"tp": 2, "pp": 2})])
def test_bit_for_bit(name, world, layout, step, uncut, config, tmp_path):
    _cut_after(uncut[name], tmp_path / "out", step)
    run = train(world, _argv(config, tmp_path / "out", layout))
    exact = ("step", "stage", "loss", "grad_norm", "lr", "tokens", "sample_digest")
    full = records(["--job.dump_folder", str(uncut[name])])
    assert [[r[k] for k in exact] for r in run] == [[r[k] for k in exact] for r in full]
    resumed, whole = (_tensors(root / "checkpoint" / "step-8") for root in (tmp_path / "out", uncut[name]))
    assert resumed.keys() == whole.keys()
    assert any("exp_avg_sq" in key for key in whole)
    for key, value in whole.items():
        np.testing.assert_array_equal(resumed[key], value, err_msg=key)


@pytest.mark.parametrize("layout", [{"dp": 2}, {"tp": 2, "dp": 2}], ids=["dp2", "tp2dp2"])
@pytest.mark.parametrize("step", [3, 4])
def test_another_layout_goes_on_alike(layout, step, uncut, config, tmp_path):
    _cut_after(uncut["many"], tmp_path / "out", step)
    world = int(np.prod(list(layout.values())))
    run = train(world, _argv(config, tmp_path / "out", layout, "--training.dataloader.num_workers", "2"))
    full = records(["--job.dump_folder", str(uncut["many"])])
    assert [r["sample_digest"] for r in run] == [r["sample_digest"] for r in full]
    assert [r["loss"] for r in run] == pytest.approx([r["loss"] for r in full], rel=1e-5)


def test_the_train_state_names_stage_and_position(uncut):
    state = json.loads((uncut["one"] / "checkpoint" / "step-4" / "train_state.json").read_text())
    assert (state["step"], state["stage_idx"], state["stage_name"]) == (4, 1, "second")
    assert state["dataloader_state"]
    samples = state["consumed_samples"]["first"]
    assert sum(samples.values()) == 16
    assert sorted(samples.values()) == [5, 11]  # 0.7 and 0.3 of 16 rows, within one row


def test_a_killed_torchrun_comes_back_by_itself(config, uncut, tmp_path):
    """Also when it began with a rewind: what it goes on from then is its own newest checkpoint."""
    out = tmp_path / "out"
    _cut_after(uncut["one"], out, 1)
    shutil.copytree(uncut["one"] / "checkpoint" / "step-6", out / "checkpoint" / "step-6")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
        "pretrain.py", *_argv(config, out, {"dp": 2}, "--checkpoint.load_step", "1"),
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint" / "step-3").exists():
        assert time.monotonic() < deadline, "no checkpoint in time"
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.05)
    os.kill(_worker(process.pid), signal.SIGKILL)
    printed, _ = process.communicate(timeout=180)
    assert process.returncode == 0, printed
    assert [int(line.split("step-")[1].split()[0]) >= 3 for line in printed.splitlines() if "Resuming" in line] == [
        False,
        True,
    ]
    assert (out / "checkpoint" / "step-6.superseded-1").is_dir()
    run, full = records(["--job.dump_folder", str(out)]), records(["--job.dump_folder", str(uncut["one"])])
    assert [r["step"] for r in run] == list(range(1, 9))
    assert [r["sample_digest"] for r in run] == [r["sample_digest"] for r in full]
    assert [r["loss"] for r in run] == pytest.approx([r["loss"] for r in full], rel=1e-5)


def test_an_edited_past_is_refused_before_any_tensor_is_read(uncut, config, tmp_path, capfd):
    out = tmp_path / "out"
    _cut_after(uncut["one"], out, 5)
    for shard in (out / "checkpoint" / "step-5").glob("*.safetensors"):
        shard.write_bytes(bytes(shard.stat().st_size))  # who reads it falls back, and finds nothing
    with pytest.raises(RuntimeError, match="exit code 2"):
        train(1, _argv(config, out, {}, "--training.data_stages.0.dataset_weights", "[0.5, 0.5]"))
    assert "stage 'first': dataset_weights was [0.7" in capfd.readouterr().err
    assert (out / "checkpoint" / "step-5").is_dir()


def test_two_runs_do_not_share_a_checkpoint_folder(uncut, config, tmp_path, capfd):
    out = tmp_path / "out"
    _cut_after(uncut["one"], out, 7)
    with open(out / "checkpoint" / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="exit code 2"):
            train(1, _argv(config, out))
    assert "in use by another run" in capfd.readouterr().err
    assert train(1, _argv(config, out))[-1]["step"] == 8


def _signalled(argv: list[str], step: int, rank: int) -> int:
    """Exit code of a run in which one rank is told to stop during the update after `step`."""
    import pretrain
    from megastage import trainer

    plain = trainer.Trainer.train_step

    def train_step(self: trainer.Trainer) -> Any:
        if (self.step, self.runtime.rank) == (step, rank):
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self)

    trainer.Trainer.train_step = train_step  # type: ignore[method-assign]
    return pretrain.main(argv)


def test_a_signal_to_one_rank_stops_all_after_a_save(uncut, config, tmp_path):
    argv = _argv(config, tmp_path, {"dp": 2}, "--checkpoint.interval", "100", "--checkpoint.async_mode", "async")
    assert run_ranks(2, _signalled, argv, 2, 1) == [0, 0]
    assert [path.name for path in (tmp_path / "checkpoint").glob("step-*")] == ["step-3"]
    run, full = train(2, argv), records(["--job.dump_folder", str(uncut["one"])])
    assert [(r["step"], r["sample_digest"]) for r in run] == [(r["step"], r["sample_digest"]) for r in full]
    assert [r["loss"] for r in run] == pytest.approx([r["loss"] for r in full], rel=1e-5)


def _worker(launcher: int) -> int:
    """One of torchrun's worker processes."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if b"pretrain.py" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    raise AssertionError(f"no worker among {children}")
