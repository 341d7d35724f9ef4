"""Whole runs over text that is tokenized while it is read: the same as with cached text, after kills, on any layout."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sympy
from test_resume import _cut_after, _tensors, _worker
from training import TINY, layout_flags, records, train

from megastage.data.tokenizer import train_bpe

pytestmark = pytest.mark.dist

STAGES = """
[training]
dataset_type = "huggingface"
dataset_folders = ["{0}", "{1}"]
dataset_weights = [0.75, 0.25]
live_text_mb = 0
steps = 10
seq_len = 256
global_batch_size = 8
local_batch_size = 1

[checkpoint]
enable = true
interval = 1
keep_latest_k = 0

[[training.data_stages]]
name = "first"
start_step = 0
end_step = 5

[[training.data_stages]]
name = "long"
start_step = 5
dataset_weights = [0.4, 0.6]
seq_len = 1024
"""
EXACT = ("step", "stage", "loss", "grad_norm", "lr", "tokens", "sample_digest")


def _sources(module: object, most: int) -> list[str]:
    """Source texts of a module's functions and classes."""
    found = [
        member for _, member in inspect.getmembers(module) if inspect.isfunction(member) or inspect.isclass(member)
    ]
    texts = []
    for member in found:
        try:
            texts.append(inspect.getsource(member)[:4000])
        except (OSError, TypeError):
            continue
    return texts[:most]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two texts, of 0.3 MB (five chunks) and of some documents, which the run reads more than once."""
    root = tmp_path_factory.mktemp("text")
    code, numbers = _sources(sympy, 150), _sources(np, 24)
    for name, texts in (("code", code), ("numbers", numbers)):
        (root / name).mkdir()
        for half in range(2):
            lines = [json.dumps({"text": text}) + "\n" for text in texts[half::2]]
            (root / name / f"{half}.jsonl").write_text("".join(lines))
    train_bpe([*code, *numbers], 600, root / "tokenizer.json")
    path = root / "run.toml"
    path.write_text(STAGES.format(root / "code", root / "numbers"))
    return path


def _argv(config: Path, out: Path, layout: dict[str, int] | None = None, *more: str) -> list[str]:
    assets = ["--model.hf_assets_path", str(config.parent / "tokenizer.json")]
    return [
        "--config", str(config), "--job.dump_folder", str(out), *TINY, *assets, *layout_flags(**(layout or {})), *more
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uncut(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uncut") / "one"
    train(1, _argv(config, out))
    return out


def _exact(out: Path) -> list[list[object]]:
    return [[record[key] for key in EXACT] for record in records(["--job.dump_folder", str(out)])]


def test_losses_are_those_of_text_tokenized_before(config, uncut, tmp_path):
    train(1, _argv(config, tmp_path, {}, "--training.live_text_mb", "256"))
    before, now = _exact(tmp_path), _exact(uncut)
    assert [row[:-1] for row in before] == [row[:-1] for row in now]
    assert len(list((uncut / "cache").glob("live-*/chunk-*"))) > 4
    assert not list((tmp_path / "cache").glob("live-*"))


@pytest.mark.parametrize("step", [pytest.param(4, marks=pytest.mark.slow), 5, pytest.param(6, marks=pytest.mark.slow)])
def test_bit_for_bit_with_an_empty_cache(step, config, uncut, tmp_path):
    _cut_after(uncut, tmp_path / "out", step)
    train(1, _argv(config, tmp_path / "out"))
    assert _exact(tmp_path / "out") == _exact(uncut)
    resumed, whole = (_tensors(root / "checkpoint" / "step-10") for root in (tmp_path / "out", uncut))
    assert resumed.keys() == whole.keys()
    for key, value in whole.items():
        np.testing.assert_array_equal(resumed[key], value, err_msg=key)


@pytest.mark.parametrize("layout", [{"dp": 2}, pytest.param({"dp": 4}, marks=pytest.mark.slow), {"tp": 2, "pp": 2}])
def test_another_layout_goes_on_alike(layout, config, uncut, tmp_path):
    _cut_after(uncut, tmp_path / "out", 4)
    world = int(np.prod(list(layout.values())))
    run = train(world, _argv(config, tmp_path / "out", layout, "--training.dataloader.num_workers", "2"))
    full = records(["--job.dump_folder", str(uncut)])
    assert [r["sample_digest"] for r in run] == [r["sample_digest"] for r in full]
    assert [r["loss"] for r in run] == pytest.approx([r["loss"] for r in full], rel=1e-5)


def test_a_run_that_was_killed_goes_on(config, uncut, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
        "pretrain.py", *_argv(config, out, {"dp": 2}),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoint" / "step-3").exists():
        assert time.monotonic() < deadline, "no checkpoint in time"
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.05)
    os.kill(_worker(process.pid), signal.SIGKILL)
    printed, _ = process.communicate(timeout=180)
    assert process.returncode == 0, printed
    run, full = records(["--job.dump_folder", str(out)]), records(["--job.dump_folder", str(uncut)])
    assert [r["sample_digest"] for r in run] == [r["sample_digest"] for r in full]
    assert [r["loss"] for r in run] == pytest.approx([r["loss"] for r in full], rel=1e-5)


def test_a_bad_line_ends_the_run_and_is_named(config, tmp_path, capfd):
    text = tmp_path / "text"
    text.mkdir()
    contents = [f"a short text, number {i}" for i in range(64)] + [f"number {i} " * 400 for i in range(40)]
    lines = [json.dumps({"text": content}) for content in contents]
    lines[100] = lines[100][:-5]
    (text / "a.jsonl").write_text("\n".join(lines))
    more = ("--training.dataset_folders", f'["{text}"]', "--training.dataset_weights", "[1.0]")
    stages = ("--training.data_stages.1.dataset_weights", "[1.0]", "--training.seq_len", "1024")
    with pytest.raises(RuntimeError, match="exit code"):
        train(1, _argv(config, tmp_path / "out", {}, *more, *stages))
    assert "a.jsonl, line 101: no JSON" in capfd.readouterr().err
    assert (tmp_path / "out" / "checkpoint" / "step-1").is_dir()  # it was reached while training
