"""The node's cache folder: what is built in it appears whole or not at all, and killed builds are cleared away.

Its size is bounded: what is built next asks `Room` for its bytes, and what was used longest ago goes.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megastage.data.sources.base import SourceError, SourceOptions

LIMIT_GB = 256.0  # MEGASTAGE_CACHE_GB overrides it
_ABANDONED_S = 86_400.0
_ENTRY = re.compile(r"(decoded|live|remote|text)-[0-9a-f]{32}")  # the time of such a folder is that of its last use
_STARTED = time.time()


def cache_folder(options: SourceOptions) -> Path:
    """`options.cache_folder`, else MEGASTAGE_CACHE, else ~/.cache/megastage."""
    return options.cache_folder or named_folder("~/.cache/megastage")


def named_folder(default: str | Path) -> Path:
    """The folder that MEGASTAGE_CACHE names, else `default`."""
    return Path(os.environ.get("MEGASTAGE_CACHE") or default).expanduser()


def entry(name: str, options: SourceOptions, build: Callable[[Path], None], what: str) -> Path:
    """The folder `name` of the cache; where it is missing, `build` fills a folder of this process's own first.

    Raises SourceError where it is missing and this process must not build.
    """
    folder = find(name, options)
    if folder is not None:
        return folder
    folder = cache_folder(options) / name
    if not options.may_build:
        raise SourceError(f"{folder}: missing; the first rank of this node {what}, so its cache differs")
    clear_abandoned(folder.parent, name.split("-", 1)[0])
    building = _private(folder)
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


def find(name: str, options: SourceOptions) -> Path | None:
    """The folder `name` of the cache, noted as used now; None where it is missing."""
    folder = cache_folder(options) / name
    if not folder.is_dir():
        return None
    with suppress(OSError):  # a cache that was filled beforehand may be read-only
        os.utime(folder)
    return folder


class Room:
    """Bytes in a cache folder for what is being built there; `what` it is made of, for messages."""

    def __init__(self, cache: Path, what: str) -> None:
        self._what, self._needed = what, 0
        limit = os.environ.get("MEGASTAGE_CACHE_GB", str(LIMIT_GB))
        try:
            self._limit = int(float(limit) * 1e9)
        except (ValueError, OverflowError):
            raise SourceError(f"MEGASTAGE_CACHE_GB = {limit!r}: must be a number of gigabytes") from None
        kept = [folder for folder in cache.glob("*-*") if _ENTRY.fullmatch(folder.name)]
        self._kept = {folder: bytes_in(folder) for folder in sorted(kept, key=_last_used, reverse=True)}

    def take(self, n_bytes: int) -> None:
        """Room for so many bytes more: what was used longest ago is removed, but nothing used since this run began.

        Raises SourceError where that is not enough.
        """
        self._needed += n_bytes
        while self.excess() > 0:
            oldest = next(reversed(self._kept), None)
            if self._needed > self._limit or oldest is None or _last_used(oldest) >= _STARTED:
                beside = "" if self._needed > self._limit else " beside the run's other sources"
                raise SourceError(
                    f"{self._what}: {self._needed / 1e9:.2f} GB do not fit the cache of {self._limit / 1e9:.2f} GB"
                    f"{beside}; raise MEGASTAGE_CACHE_GB, or give local files that can be mapped"
                )
            _remove(oldest)
            del self._kept[oldest]

    def excess(self) -> int:
        """Bytes that what is kept and what was asked for take beyond the limit."""
        return self._needed + sum(self._kept.values()) - self._limit


def _remove(folder: Path) -> None:
    """Rename first: nobody sees half an entry, and what a kill leaves is cleared away as a killed build is."""
    aside = _private(folder)
    with suppress(OSError):  # another process was faster
        os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _private(folder: Path) -> Path:
    """A name for an entry while it is built or removed, by this process alone."""
    return folder.with_name(f".{folder.name}-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0


def bytes_in(folder: Path) -> int:
    """The sizes of all files below a folder."""
    total = 0
    for file in folder.rglob("*"):
        with suppress(OSError):  # being removed by another process
            total += file.stat().st_size if file.is_file() else 0
    return total


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
