"""Names and moves inside a checkpoint folder. All of it is done by rank 0; nothing is ever overwritten.

step-N                a complete checkpoint
step-N.tmp            being written (or left by a killed run)
step-N.superseded-K   complete, but training went another way from an earlier step
step-N.bad-K          found damaged
step-N.deleting       on its way out: renamed first, so that a half-deleted folder never looks complete
latest                text file with the name of the newest checkpoint, for people and scripts
lock                  held by the run that writes here; says which
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import time
from pathlib import Path

from megastage.checkpoint.errors import BadCheckpoint
from megastage.checkpoint.manifest import MANIFEST, check_sizes, read_manifest

COMPLETE = re.compile(r"step-(0|[1-9][0-9]*)")
LEFTOVER = re.compile(r"step-([0-9]+)\.(tmp|deleting)")
ASIDE = re.compile(r"step-([0-9]+)\.(superseded|bad)-([0-9]+)")


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return root / f"step-{step}"


def hold(root: Path, patience_s: float) -> int:
    """Lock the folder until the file descriptor returned is closed or the process ends, however it ends.

    Raises ValueError where another process keeps it for `patience_s` seconds. A file system without locks is taken as
    it is.
    """
    lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = os.pread(lock, 1000, 0).decode(errors="replace").strip()
                os.close(lock)
                raise ValueError(
                    f"checkpoint folder {root} is in use by another run ({holder or 'unknown'}); wait for it or end "
                    "it, or give this run a checkpoint.folder or job.dump_folder of its own"
                ) from None
            time.sleep(0.1)
        except OSError:
            return lock
    with contextlib.suppress(OSError):  # a full disk shall not be what stops a run here
        os.truncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return lock


def complete_steps(root: Path) -> list[int]:
    """Steps with a folder that was finished and not set aside, oldest first."""
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for e in os.scandir(root) if e.is_dir() and (m := COMPLETE.fullmatch(e.name)))


def aside(root: Path, why: str = "superseded|bad") -> list[Path]:
    """Folders set aside, oldest first."""
    found = []
    for entry in os.scandir(root) if root.is_dir() else ():
        match = ASIDE.fullmatch(entry.name)
        if match and match[2] in why.split("|"):
            found.append((entry.stat().st_ctime_ns, int(match[1]), int(match[3]), root / entry.name))
    return [path for *_, path in sorted(found)]


def set_aside(root: Path, step: int, why: str) -> Path:
    """Rename step-N to the first free step-N.`why`-K and return the new path."""
    number = 1
    while (target := root / f"step-{step}.{why}-{number}").exists():
        number += 1
    os.rename(step_folder(root, step), target)
    sync_folder(root)
    return target


def recover(root: Path) -> list[str]:
    """Clear up after a killed run and say what was done.

    A .tmp folder whose manifest was already written is complete (the manifest is written last, after every shard was
    synced): the missing rename is made good. Anything else half-done is removed.
    """
    notes = []
    for name in sorted(e.name for e in os.scandir(root) if e.is_dir()):
        match = LEFTOVER.fullmatch(name)
        if not match:
            continue
        path, target = root / name, step_folder(root, int(match[1]))
        if match[2] == "tmp" and not target.exists() and _is_complete(path):
            os.rename(path, target)
            notes.append(f"{name} was complete but for its name: kept as {target.name}")
        else:
            remove(path)
            notes.append(f"{name} was left half-done by an earlier run: removed")
    if notes:
        sync_folder(root)
    repoint_latest(root)
    return notes


def remove(path: Path) -> None:
    """Delete a folder so that at no moment a part of it looks like a checkpoint."""
    doomed = path.with_name(f"{path.name.split('.')[0]}.deleting")
    if path != doomed:
        if doomed.exists():
            shutil.rmtree(doomed)
        os.rename(path, doomed)
    shutil.rmtree(doomed)


def prune(root: Path, keep: int, just_saved: int) -> list[str]:
    """Keep the newest `keep` checkpoints and the newest `keep` folders set aside (0: all); returns names removed."""
    if keep <= 0:
        return []
    doomed = [step_folder(root, s) for s in complete_steps(root)[:-keep] if s != just_saved]
    doomed += aside(root)[:-keep]
    for path in doomed:
        remove(path)
    return [path.name for path in doomed]


def commit(tmp: Path, target: Path) -> None:
    """Give a finished folder its name, for good: shards and manifest are synced by now, here the names are."""
    sync_folder(tmp)
    os.rename(tmp, target)
    sync_folder(target.parent)
    write_latest(target.parent, target.name)


def write_latest(root: Path, name: str) -> None:
    """Point `latest` at a checkpoint, atomically."""
    path = root / "latest.tmp"
    with open(path, "w") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(path, root / "latest")
    sync_folder(root)


def repoint_latest(root: Path) -> None:
    """Let `latest` name the newest folder again after one was set aside or found under another name; none: remove it.

    A run looks at the folders themselves, so a disk that refuses the write shall not stop it.
    """
    steps = complete_steps(root)
    pointer = root / "latest"
    with contextlib.suppress(OSError):
        if not steps:
            pointer.unlink(missing_ok=True)
        elif not pointer.exists() or pointer.read_text(errors="replace").strip() != step_folder(root, steps[-1]).name:
            write_latest(root, step_folder(root, steps[-1]).name)


def sync_folder(path: Path) -> None:
    """fsync a folder: makes creations and renames in it survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_complete(path: Path) -> bool:
    if not (path / MANIFEST).is_file():
        return False
    try:
        check_sizes(path, read_manifest(path))
    except BadCheckpoint:
        return False
    return True
