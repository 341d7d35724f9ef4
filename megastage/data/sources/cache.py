"""The node's cache folder: what is built in it appears whole or not at all, and killed builds are cleared away."""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from megastage.data.sources.base import SourceError, SourceOptions

_ABANDONED_S = 86_400.0


def cache_folder(options: SourceOptions) -> Path:
    """`options.cache_folder`, else MEGASTAGE_CACHE, else ~/.cache/megastage."""
    return options.cache_folder or Path(os.environ.get("MEGASTAGE_CACHE", "~/.cache/megastage")).expanduser()


def entry(name: str, options: SourceOptions, build: Callable[[Path], None], what: str) -> Path:
    """The folder `name` of the cache; where it is missing, `build` fills a folder of this process's own first.

    Raises SourceError where it is missing and this process must not build.
    """
    folder = cache_folder(options) / name
    if folder.is_dir():
        return folder
    if not options.may_build:
        raise SourceError(f"{folder}: missing; the first rank of this node {what}, so its cache differs")
    clear_abandoned(folder.parent, name.split("-", 1)[0])
    building = folder.with_name(f".{name}-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        building.mkdir(parents=True)
        build(building)
        os.rename(building, folder)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        if isinstance(error, Exception) and folder.is_dir():
            return folder  # another process was faster
        raise
    return folder


def clear_abandoned(cache: Path, kind: str) -> None:
    """Remove builds `.KIND-KEY-HOST-PID-RANDOM` whose process is gone from this machine, or still for a day.

    And what such a build has staged beside it, under the name `..KIND-KEY-HOST-PID-RANDOM.partial`.
    """
    for folder in (*cache.glob(f".{kind}-*"), *cache.glob(f"..{kind}-*")):
        *_, host, pid, _ = ["", "", *folder.name.split("-")]
        if host == _host() and pid.isdigit():
            gone = not _is_running(int(pid))
        else:
            gone = _idle_s(folder) > _ABANDONED_S
        if gone:
            shutil.rmtree(folder, ignore_errors=True)


def _host() -> str:
    return re.sub("[^A-Za-z0-9]", "_", socket.gethostname())


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _idle_s(folder: Path) -> float:
    """Seconds since anything in the folder was written; 0 when it has just gone."""
    try:
        return time.time() - max(entry.stat().st_mtime for entry in (folder, *folder.rglob("*")))
    except OSError:
        return 0.0
