"""What a run prints and records."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from megastage import logs
from megastage.metrics import JsonLines, TensorBoard, Wandb

RECORD = {
    "step": 7, "stage": "general", "loss": 3.25, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_s": 12345.6, "mfu": 0.412,
    "memory_gib": 1.5, "data_wait_s": 0.002,
}  # fmt: skip


def test_a_step_line_holds_every_figure():
    line = logs.step_line(RECORD, 1000)
    for part in ("step    7/1000", "stage general", "loss 3.2500", "grad_norm 0.5000", "lr 1.000e-03"):
        assert part in line
    for part in ("tokens/s 12,346", "mfu 41.2%", "memory 1.50GiB", "data_wait 2.0ms"):
        assert part in line
    assert "mfu n/a" in logs.step_line({**RECORD, "mfu": None}, 1000)
    assert "loss n/a" in logs.step_line({**RECORD, "loss": None}, 1000)


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', "\x00\x00"], ids=["clean", "cut", "zeros"])
def test_records_of_updates_done_again_are_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + tail)
    lines = JsonLines(path, 3)
    lines.write({"step": 4, "again": True})
    lines.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "again": True},
    ]  # fmt: skip


def _steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_fresh_start_in_a_used_folder_keeps_the_old_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for number in range(3):
        lines = JsonLines(path, 0)
        for step in range(1, 4 - number):
            lines.write({"step": step})
        lines.close()
    assert _steps(path) == [1]
    assert _steps(tmp_path / "metrics.jsonl.superseded-1") == [1, 2, 3]
    assert _steps(tmp_path / "metrics.jsonl.superseded-2") == [1, 2]


def test_a_rewind_keeps_the_records_of_the_way_not_taken(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    JsonLines(path, 5, rewound=True).close()
    assert sorted(tmp_path.iterdir()) == [path]  # nothing was left behind
    JsonLines(path, 2, rewound=True).close()
    assert _steps(path) == [1, 2]
    assert _steps(tmp_path / "metrics.jsonl.superseded-1") == [1, 2, 3, 4, 5]
    JsonLines(path, 1).close()  # updates that will be done again, equal to the bit
    assert len(list(tmp_path.iterdir())) == 2


def test_weights_and_biases_gets_every_figure(tmp_path, monkeypatch):
    """The package is an extra and needs an account: a stand-in records the calls of its documented interface."""
    calls: list[tuple] = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append(("finished",))
    )
    stand_in = ModuleType("wandb")
    stand_in.init = lambda dir, config: calls.append((dir, config)) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    sink = Wandb(tmp_path / "wandb", {"a": 1})
    sink.write({"step": 3, "stage": "x", "loss": 1.5, "mfu": None, "validation": {"loss": 2.0}})
    sink.close()
    assert calls == [
        (str(tmp_path / "wandb"), {"a": 1}), (3, {"stage": "x", "loss": 1.5, "validation/loss": 2.0}), ("finished",),
    ]  # fmt: skip


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"enable_wandb = true needs the wandb package"):
        Wandb(tmp_path, {})


def test_a_resumed_run_writes_no_figure_twice(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for done, steps in ((0, range(1, 6)), (3, range(4, 7))):
        board = TensorBoard(tmp_path, done)
        for step in steps:
            board.write({"step": step, "loss": float(10 * done + step)})
        board.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(1, 1), (2, 2), (3, 3), (4, 34), (5, 35), (6, 36)]
