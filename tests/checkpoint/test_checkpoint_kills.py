"""Disks that refuse and processes that are killed: the newest checkpoint is a good one all the same."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from folder_states import ASYNC, fill, loaded, names, state_at

from megastage.checkpoint import folders, storage
from megastage.checkpoint.errors import CheckpointFailed
from megastage.checkpoint.manager import CheckpointManager


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
        wanted = reached + rng.randint(0, 4)  # by what is on disk, so that a busy machine gets as far
        deadline = time.monotonic() + 60
        while max(folders.complete_steps(root), default=0) < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
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
