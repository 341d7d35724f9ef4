"""The life of a checkpoint folder in one process: keeping, falling back, rewinding, background saves, kills."""

import logging
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from megastage.checkpoint import folders, storage
from megastage.checkpoint.errors import BadCheckpoint, CheckpointFailed
from megastage.checkpoint.loading import load_initial
from megastage.checkpoint.manager import CheckpointManager

ASYNC = ["disabled", "async", "async_with_pinned_mem"]


def state_at(step: int, n: int = 1000) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((n,), float(step)), "optimizer.exp_avg.w": torch.full((n,), -float(step))}


def loaded(manager: CheckpointManager, load_step: int = -1) -> int | None:
    """The step that a run would resume from, with its values proved to be of that step."""
    out = state_at(-1)
    found = manager.load_newest(out, load_step)
    if found is None:
        return None
    step, train_state = found
    assert train_state == {"step": step}
    assert all(torch.equal(out[k], v) for k, v in state_at(step).items())
    return step


def fill(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(step, state_at(step), {"step": step})
    manager.wait()


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def harm(folder: Path, position: int = -5) -> None:
    path = folder / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


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
    for name in ("step-05", "step-7.tmp", "step-8.bad-1", "step-x", "xstep-9", "step-11.superseded-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-12").write_text("a file")
    assert loaded(CheckpointManager(tmp_path)) == 2


def test_model_only_is_for_new_runs_and_never_costs_the_resumable_one(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "a", keep_latest_k=1)
    fill(manager, 1)
    manager.save(2, state_at(2), {"step": 2}, model_only=True, export_dtype=torch.bfloat16)
    assert manager.steps() == [1, 2]
    assert loaded(CheckpointManager(tmp_path / "a")) == 1
    out = {"model.w": torch.zeros(1000, dtype=torch.bfloat16), "optimizer.exp_avg.w": torch.zeros(1000)}
    assert load_initial(tmp_path / "a" / "step-2", out) == {"step": 2}
    assert (out["model.w"] == 2).all()
    assert not out["optimizer.exp_avg.w"].any()
    full = state_at(0)
    load_initial(tmp_path / "a" / "step-1", full, model_only=False)
    assert torch.equal(full["optimizer.exp_avg.w"], state_at(1)["optimizer.exp_avg.w"])
    assert load_initial(tmp_path / "a", out) == {"step": 2}
    with pytest.raises(ValueError, match="neither a checkpoint"):
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


@pytest.mark.parametrize("mode", ASYNC)
def test_an_io_error_while_writing_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    manager = CheckpointManager(tmp_path, async_mode=mode)
    fill(manager, 1)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    if mode == "disabled":
        with pytest.raises(CheckpointFailed, match=r"step-2 .*rank 0 on .*rank-00000.safetensors.*No space left"):
            manager.save(2, state_at(2), {"step": 2})
    else:
        manager.save(2, state_at(2), {"step": 2})
        with pytest.raises(CheckpointFailed, match=r"step-2 .*rank 0 on .*rank-00000.safetensors.*No space left"):
            manager.save(3, state_at(3), {"step": 3})
    monkeypatch.undo()
    assert names(tmp_path) == ["latest", "step-1"]
    fill(manager, 4)  # the failure was told once; the manager is usable again
    assert loaded(manager) == 4


def test_a_real_full_disk(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel itself refuse the bytes, in the middle of a tensor."""
    import resource

    manager = CheckpointManager(tmp_path)
    fill(manager, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(CheckpointFailed, match=r"step-2.tmp/rank-00000.safetensors \(tensor .*File too large"):
            manager.save(2, state_at(2), {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert names(tmp_path) == ["latest", "step-1"]


def in_child(action) -> int:
    """Run `action` in a forked process; returns its exit status (0, or the number it died by)."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_before_call(number: int) -> None:
    """In this process, the number-th operation on the file system does not happen: the process is gone."""
    left = [number]

    def guarded(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir"):
        setattr(os, name, guarded(getattr(os, name)))
    storage._write_all = guarded(storage._write_all)


@pytest.mark.parametrize("scenario", ["next step", "same step again", "after a rewind"])
def test_a_kill_before_any_file_operation_leaves_a_good_newest(tmp_path: Path, scenario: str) -> None:
    """Every crash point there is, one by one: the newest checkpoint is the old one or the new one, never a mixture.

    Also where the old one was already renamed and the new one not yet: the next start makes the rename good.
    """
    allowed = {"next step": {3, 4}, "same step again": {3}, "after a rewind": {3}}[scenario]
    points = 0
    for point in range(1, 200):
        root = tmp_path / str(point)
        fill(CheckpointManager(root, keep_latest_k=2), 2, 3)

        def run(root: Path = root, point: int = point) -> None:
            manager = CheckpointManager(root, keep_latest_k=2)
            manager.load(2 if scenario == "after a rewind" else 3, state_at(0))
            if scenario == "same step again":
                manager._resumed_from = None
            die_before_call(point)
            step = {"next step": 4, "same step again": 3, "after a rewind": 3}[scenario]
            manager.save(step, state_at(step), {"step": step})

        status = in_child(run)
        assert status in (0, -signal.SIGKILL)
        manager = CheckpointManager(root, keep_latest_k=2)
        assert loaded(manager) in allowed, names(root)
        for step in manager.steps():
            manager.verify(step)  # a half-deleted old one would still be named like a checkpoint
        assert not [n for n in names(root) if n.endswith((".tmp", ".deleting")) and n != "latest.tmp"]
        fill(manager, 9)
        assert loaded(CheckpointManager(root)) == 9
        if status == 0:
            break
        points += 1
    assert 10 < points < 199


def kill_trials(root: Path, trials: int, mode: str, seed: int) -> None:
    rng = random.Random(seed)
    reached = 0
    for _ in range(trials):
        read, write = os.pipe()

        def train(write: int = write) -> None:
            manager = CheckpointManager(root, keep_latest_k=2, async_mode=mode)
            step = loaded(manager) or 0
            while True:
                step += 1
                manager.save(step, state_at(step), {"step": step})
                if mode == "disabled":
                    os.write(write, step.to_bytes(8, "little"))

        pid = os.fork()
        if pid == 0:
            try:
                train()
            finally:
                os._exit(3)
        os.close(write)
        time.sleep(rng.uniform(0.01, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        said = b""
        while part := os.read(read, 1 << 16):
            said += part
        os.close(read)
        promised = int.from_bytes(said[-8:], "little") if said else reached
        manager = CheckpointManager(root, keep_latest_k=2)
        reached = max(loaded(manager) or 0, reached)
        assert (loaded(manager) or 0) >= promised
        assert not folders.aside(root, "bad")
    assert reached > trials


@pytest.mark.parametrize("mode", ASYNC[:2])
def test_kill_9_at_random_moments_always_leaves_a_good_newest(tmp_path: Path, mode: str) -> None:
    kill_trials(tmp_path, 12, mode, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ASYNC[:2])
def test_many_kills(tmp_path: Path, mode: str) -> None:
    kill_trials(tmp_path, 200, mode, seed=2)


def test_a_read_only_folder_is_an_error_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(CheckpointFailed, match="Read-only file system"):
        CheckpointManager(tmp_path)


def test_pruning_that_fails_does_not_fail_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(tmp_path, keep_latest_k=1)
    fill(manager, 1)
    monkeypatch.setattr(folders.shutil, "rmtree", lambda p: (_ for _ in ()).throw(OSError(5, "I/O error")))
    fill(manager, 2)
    monkeypatch.undo()
    assert loaded(CheckpointManager(tmp_path)) == 2
    assert names(tmp_path) == ["latest", "step-2"]


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


def test_load_only_stops_at_damage_and_renames_nothing(tmp_path: Path) -> None:
    fill(CheckpointManager(tmp_path), 1, 2)
    (tmp_path / "step-2" / "train_state.json").write_text("{}")
    before = names(tmp_path)
    with pytest.raises(BadCheckpoint, match="train_state"):
        CheckpointManager(tmp_path, load_only=True).latest_good()
    assert names(tmp_path) == before
