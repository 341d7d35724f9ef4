"""Folders that appear whole or not at all: staged beside their target, synced, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def fsync_path(path: Path) -> None:
    """Flush a file's or folder's bytes (for a folder: its entries) to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def close_discarded(*files: BinaryIO) -> None:
    """Close files that are about to be deleted. What a full disk does not take of them is of no interest any more."""
    for file in files:
        with contextlib.suppress(OSError):
            file.close()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file through a temporary one, fsync and rename; readers see the old or the new content only."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


class StagedFolder:
    """A folder built under `.NAME.partial` beside its target and renamed into place by `commit`.

    A target that exists is an error unless `overwrite`; even then it is replaced only when every entry in it
    satisfies `is_ours`, so a mistyped path never deletes foreign files. The old folder is moved aside
    (`.NAME.replaced`), the new one renamed into place, and only then is the old one deleted. If the process dies
    between the two renames, the next StagedFolder for that target puts the old folder back.
    """

    def __init__(self, target: str | os.PathLike[str], *, overwrite: bool, is_ours: Callable[[str], bool]) -> None:
        """Raises ValueError when the target stands in the way, OSError when the parent cannot be written."""
        self.target = Path(os.path.abspath(target))
        self.path = self.target.with_name(f".{self.target.name}.partial")
        self._aside = self.target.with_name(f".{self.target.name}.replaced")
        self._is_ours = is_ours
        self._overwrite = overwrite
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._recover()
        check_target(self.target, overwrite=overwrite, is_ours=is_ours)
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()

    def _recover(self) -> None:
        if not self._aside.exists():
            return
        if self.target.exists():
            shutil.rmtree(self._aside)
        else:
            os.rename(self._aside, self.target)

    def commit(self) -> None:
        """Rename the staged folder into place. Every file in it must be synced already."""
        fsync_path(self.path)
        # Asked again: something may have appeared there while the folder was being built.
        check_target(self.target, overwrite=self._overwrite, is_ours=self._is_ours)
        if self.target.exists():
            os.rename(self.target, self._aside)
        os.rename(self.path, self.target)
        fsync_path(self.target.parent)
        shutil.rmtree(self._aside, ignore_errors=True)

    def discard(self) -> None:
        """Delete what was staged; the target is left as it was."""
        shutil.rmtree(self.path, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool, is_ours: Callable[[str], bool]) -> None:
    """Raise ValueError when `target` exists and may not be replaced; an empty folder never stands in the way."""
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise ValueError(f"{target}: exists and is not a folder; choose another output")
    foreign = sorted(name for name in _entries(target) if not is_ours(name))
    if foreign:
        raise ValueError(
            f"{target}: holds files that are not part of a data set ({', '.join(foreign[:3])}), so it is not replaced; "
            "choose another output folder"
        )
    if not overwrite and any(True for _ in _entries(target)):
        raise ValueError(f"{target}: exists already; choose another output or overwrite it on purpose (--overwrite)")


def _entries(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.name + ("/" if entry.is_dir(follow_symlinks=False) else "")
