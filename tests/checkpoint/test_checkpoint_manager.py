"""The life of a checkpoint folder in one process: keeping, falling back, rewinding, background saves."""

import logging
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from folder_states import ASYNC, fill, harm, loaded, names, state_at

from megastage.checkpoint import storage
from megastage.checkpoint.errors import BadCheckpoint, CheckpointFailed
from megastage.checkpoint.loading import load_initial
from megastage.checkpoint.manager import CheckpointManager


@pytest.mark.parametrize("mode", ASYNC)
@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])])
def test_keep_latest_k(tmp_path: Path, mode: str, keep: int, left: list[int]) -> None:
    manager = CheckpointManager(tmp_path, keep_latest_k=keep, async_mode=mode)
    fill(manager, 1, 2, 3, 4)
    assert manager.steps() == left
    assert (tmp_path / "latest").read_text() == "step-4\n"
    assert loaded(manager) == 4
    assert names(tmp_path) == sorted(["latest", *(f"step-{s}" for s in left)])


def test_folders_set_aside_go_last_and_oldest_first(tmp_path: Path) -> None:
    fill(CheckpointManager(tmp_path, keep_latest_k=2), 1, 2)
    for _ in range(4):  # each start knows nothing of the old steps, so its saves supersede them
        fill(CheckpointManager(tmp_path, keep_latest_k=2), 1, 2)
    assert [n for n in names(tmp_path) if "superseded" not in n] == ["latest", "step-1", "step-2"]
    assert len([n for n in names(tmp_path) if "superseded" in n]) == 2


def test_saving_a_step_again_overwrites_nothing(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_latest_k=0)
    fill(manager, 5)
    old = (tmp_path / "step-5" / "manifest.json").read_bytes()
    manager.save(5, state_at(6), {"step": 6})
    manager.save(5, state_at(7), {"step": 7})
    assert names(tmp_path) == ["latest", "step-5", "step-5.superseded-1", "step-5.superseded-2"]
    assert (tmp_path / "step-5.superseded-1" / "manifest.json").read_bytes() == old
    out = state_at(0)
    assert manager.load(5, out) == {"step": 7}


@pytest.mark.parametrize("mode", ASYNC[:2])
def test_a_rewind_sets_the_later_steps_aside_before_training_goes_on(tmp_path: Path, mode: str) -> None:
    fill(CheckpointManager(tmp_path, keep_latest_k=0), 10, 20, 30)
    manager = CheckpointManager(tmp_path, keep_latest_k=0, async_mode=mode)
    assert loaded(manager, load_step=10) == 10
    assert manager.steps() == [10, 20, 30]  # looking alone changes nothing
    fill(manager, 15)
    assert names(tmp_path) == ["latest", "step-10", "step-15", "step-20.superseded-1", "step-30.superseded-1"]
    fill(manager, 20)
    assert manager.steps() == [10, 15, 20]
    assert loaded(CheckpointManager(tmp_path)) == 20

    manager = CheckpointManager(tmp_path, keep_latest_k=0)
    manager.load(10, state_at(0))
    manager.supersede_later(10)
    assert manager.steps() == [10]


def test_going_on_from_the_newest_supersedes_nothing(tmp_path: Path) -> None:
    fill(CheckpointManager(tmp_path, keep_latest_k=0), 10, 20)
    manager = CheckpointManager(tmp_path, keep_latest_k=0)
    loaded(manager)
    fill(manager, 30)
    assert manager.steps() == [10, 20, 30]


def test_fallback_skips_bad_ones_renames_them_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(CheckpointManager(tmp_path), 1, 2, 3, 4)
    harm(tmp_path / "step-4")
    (tmp_path / "step-3" / "manifest.json").unlink()
    with caplog.at_level(logging.ERROR):
        assert loaded(CheckpointManager(tmp_path)) == 2
    assert {"step-3.bad-1", "step-4.bad-1"} <= set(names(tmp_path))
    assert "step-4 is damaged and now named step-4.bad-1" in caplog.text
    assert "rank-00000.safetensors: tensor optimizer.exp_avg.w" in caplog.text or "tensor model.w" in caplog.text
    manager = CheckpointManager(tmp_path)
    assert loaded(manager) == 2
    fill(manager, 3)
    harm(tmp_path / "step-3")
    assert loaded(CheckpointManager(tmp_path)) == 2
    assert "step-3.bad-2" in names(tmp_path)


def test_latest_good_judges_by_sizes_and_manifest(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    assert manager.latest_good() is None
    fill(manager, 1, 2)
    os.truncate(tmp_path / "step-2" / "rank-00000.safetensors", 100)
    assert manager.latest_good() == 1
    assert manager.train_state(1) == {"step": 1}
    assert "step-2.bad-1" in names(tmp_path)


def test_nothing_good_left_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    fill(CheckpointManager(tmp_path), 1)
    harm(tmp_path / "step-1")
    for _ in range(2):
        with pytest.raises(CheckpointFailed, match=r"no good checkpoint is left, only step-1.bad-1"):
            loaded(CheckpointManager(tmp_path))
        with pytest.raises(CheckpointFailed, match=r"no good checkpoint is left"):
            CheckpointManager(tmp_path).latest_good()


def test_load_step_takes_that_one_or_nothing(tmp_path: Path) -> None:
    fill(CheckpointManager(tmp_path), 1, 2)
    manager = CheckpointManager(tmp_path)
    with pytest.raises(ValueError, match=r"load_step = 7: .* has steps \[1, 2\]"):
        loaded(manager, load_step=7)
    harm(tmp_path / "step-1")
    with pytest.raises(BadCheckpoint):
        loaded(manager, load_step=1)
    assert manager.steps() == [1, 2]


def test_a_folder_renamed_to_another_step_is_bad(tmp_path: Path) -> None:
    fill(CheckpointManager(tmp_path), 1, 2)
    (tmp_path / "step-2").rename(tmp_path / "step-9")
    assert loaded(CheckpointManager(tmp_path)) == 1
    assert "step-9.bad-1" in names(tmp_path)


def test_other_names_are_not_checkpoints(tmp_path: Path) -> None:
    fill(CheckpointManager(tmp_path), 2)
    for name in ("step-05", "step-7.tmp", "step-8.bad-1", "step-x", "xstep-9", "step-11.superseded-1", "step-1\u0663"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-12").write_text("a file")
    assert loaded(CheckpointManager(tmp_path)) == 2


def test_latest_names_the_newest_also_after_others_were_set_aside(tmp_path: Path) -> None:
    pointer = tmp_path / "latest"
    fill(CheckpointManager(tmp_path), 1, 2, 3)
    harm(tmp_path / "step-3")
    assert loaded(CheckpointManager(tmp_path)) == 2
    assert pointer.read_text() == "step-2\n"
    manager = CheckpointManager(tmp_path)
    manager.load(1, state_at(0))
    manager.supersede_later(1)
    assert pointer.read_text() == "step-1\n"
    pointer.write_bytes(b"\xff cut")  # as a kill or a person may leave it
    assert loaded(CheckpointManager(tmp_path)) == 1
    assert pointer.read_text() == "step-1\n"
    harm(tmp_path / "step-1")
    with pytest.raises(CheckpointFailed, match="no good checkpoint is left"):
        loaded(CheckpointManager(tmp_path))
    assert not pointer.exists()


@pytest.mark.parametrize("name", ["manifest.json", "train_state.json", "rank-00000.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_not_a_regular_file_is_damage_and_never_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    fill(CheckpointManager(tmp_path), 1, 2)
    path = tmp_path / "step-2" / name
    path.rename(tmp_path / "elsewhere")
    {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda p: os.symlink("../elsewhere", p)}[kind](path)
    assert loaded(CheckpointManager(tmp_path)) == 1
    assert "step-2.bad-1" in names(tmp_path)


def test_model_only_is_for_new_runs_and_never_costs_the_resumable_one(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "a", keep_latest_k=1)
    fill(manager, 1)
    manager.save(2, state_at(2), {"step": 2}, model_only=True, export_dtype=torch.bfloat16)
    assert manager.steps() == [1, 2]
    assert loaded(CheckpointManager(tmp_path / "a")) == 1
    with pytest.raises(ValueError, match=r"load_step = 2: that one holds the model only; take another of \[1, 2\]"):
        loaded(CheckpointManager(tmp_path / "a"), load_step=2)
    out = {"model.w": torch.zeros(1000, dtype=torch.bfloat16), "optimizer.exp_avg.w": torch.zeros(1000)}
    assert load_initial(tmp_path / "a" / "step-2", out) == {"step": 2}
    assert (out["model.w"] == 2).all()
    assert not out["optimizer.exp_avg.w"].any()
    full = state_at(0)
    load_initial(tmp_path / "a" / "step-1", full, model_only=False)
    assert torch.equal(full["optimizer.exp_avg.w"], state_at(1)["optimizer.exp_avg.w"])
    assert load_initial(tmp_path / "a", out) == {"step": 2}
    with pytest.raises(ValueError, match=r'checkpoint.initial_load_path = ".*": neither a checkpoint .* checkpoints$'):
        load_initial(tmp_path, out)
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="set initial_load_in_hf = true"):
        load_initial(tmp_path, out)


@pytest.mark.parametrize(("option", "value"), [("async_mode", "yes"), ("keep_latest_k", -1)])
def test_bad_options_name_themselves(tmp_path: Path, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"checkpoint.{option} = {value!r}"):
        CheckpointManager(tmp_path, **{option: value})


def test_async_save_keeps_the_values_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = storage._write_file
    monkeypatch.setattr(storage, "_write_file", lambda *a: (gate.wait(10), real(*a))[1])
    manager = CheckpointManager(tmp_path, async_mode="async")
    live = state_at(3)
    manager.save(3, live, train := {"step": 3})
    for value in live.values():
        value.fill_(99)
    train["step"] = 99
    assert manager._thread is not None
    assert manager._thread.is_alive()
    assert not (tmp_path / "step-3").exists()
    gate.set()
    manager.wait()
    assert loaded(manager) == 3


def test_at_most_one_save_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = [], []
    real = storage._write_file

    def slow(*args):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return real(*args)

    monkeypatch.setattr(storage, "_write_file", slow)
    manager = CheckpointManager(tmp_path, async_mode="async")
    fill(manager, 1, 2, 3)
    assert most == [1, 1, 1]
    assert manager.steps() == [1, 2, 3]


def test_a_held_folder_is_refused_until_it_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megastage.checkpoint.manager.HELD_FOLDER_PATIENCE_S", 0.2)
    first = CheckpointManager(tmp_path, hold=True)
    with pytest.raises(ValueError, match=rf"in use by another run \(process {os.getpid()} on "):
        CheckpointManager(tmp_path, hold=True)
    (tmp_path / "step-3.tmp").mkdir()
    CheckpointManager(tmp_path, load_only=True)  # who only reads may, and leaves what is being written
    assert (tmp_path / "step-3.tmp").is_dir()
    first.close()
    CheckpointManager(tmp_path, hold=True).close()


def test_load_only_reads_from_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(CheckpointManager(tmp_path), 1, 2)

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(30, "Read-only file system")

    for module, name in ((Path, "touch"), (Path, "mkdir"), (os, "rename"), (os, "replace")):
        monkeypatch.setattr(module, name, refuse)
    assert loaded(CheckpointManager(tmp_path, load_only=True)) == 2
    assert loaded(CheckpointManager(tmp_path / "absent", load_only=True)) is None


def test_load_only_stops_at_damage_and_renames_nothing(tmp_path: Path) -> None:
    fill(CheckpointManager(tmp_path), 1, 2)
    (tmp_path / "step-2" / "train_state.json").write_text("{}")
    before = names(tmp_path)
    with pytest.raises(BadCheckpoint, match="train_state"):
        CheckpointManager(tmp_path, load_only=True).latest_good()
    assert names(tmp_path) == before
