"""Data sets behind URLs (s3://, gs://, ... by the optional package fsspec): copied whole into a bounded local cache.

Training reads at random, which only local files serve well; a data set is therefore fetched once per node, before the
first step. The cache key is the URL with names, sizes and versions of all files, so changed data is fetched again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from megastage.data.sources.base import SourceError, SourceOptions

LIMIT_GB = 256.0  # MEGASTAGE_REMOTE_CACHE_GB overrides it
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "created")
_USED = ".used"
_STARTED = time.time()


def fetch(url: str, options: SourceOptions) -> Path:
    """The local path that stands for `url`: a folder, a file, or a prefix of files (as Megatron's p.bin, p.idx).

    Raises SourceError when it cannot be read or does not fit the cache.
    """
    fs, files, root = _files(url)
    sizes = {name: int(info["size"]) for name, info in files.items()}
    digest = hashlib.blake2b(url.encode(), digest_size=16)
    for name, info in sorted(files.items()):
        version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
        digest.update(f"{name}\0{sizes[name]}\0{version}\n".encode())
    cache = options.cache_folder or Path(os.environ.get("MEGASTAGE_CACHE", "~/.cache/megastage")).expanduser()
    folder = cache / f"remote-{digest.hexdigest()}"
    if not folder.is_dir():
        if not options.may_build:
            raise SourceError(f"{folder}: missing; the first rank of this node fetches {url}, so its cache differs")
        _make_room(cache, sum(sizes.values()), url)
        _download(fs, root, list(files), folder, url)
    (folder / _USED).touch()
    return folder / root.rsplit("/", 1)[-1]


def _files(url: str) -> tuple[Any, dict[str, dict[str, Any]], str]:
    """(file system, details by path, root): the files below a folder, one file, or those that begin with a prefix."""
    try:
        import fsspec
    except ImportError:
        raise SourceError(f"{url}: needs the package fsspec (and one for its kind, as s3fs or gcsfs)") from None
    try:
        fs, root = fsspec.core.url_to_fs(url)
        root = root.rstrip("/")
        found = fs.find(root, detail=True) or fs.glob(f"{root}.*", detail=True)
        files = {name: info for name, info in found.items() if info.get("type") != "directory"}
    except Exception as error:  # every kind of file system raises its own
        raise SourceError(f"{url}: cannot be listed ({type(error).__name__}: {error})") from error
    if not files:
        raise SourceError(f"{url}: no such file or folder, or it is empty")
    return fs, files, root


def _make_room(cache: Path, needed: int, url: str) -> None:
    """Remove the data sets used longest ago until `needed` bytes fit, but none that was used since this run began."""
    limit = int(float(os.environ.get("MEGASTAGE_REMOTE_CACHE_GB", LIMIT_GB)) * 1e9)
    if needed > limit:
        raise SourceError(
            f"{url}: {needed / 1e9:.2f} GB do not fit the cache of {limit / 1e9:.2f} GB; raise "
            "MEGASTAGE_REMOTE_CACHE_GB, or copy it to a local folder"
        )
    kept = sorted(cache.glob("remote-*"), key=_last_used)
    sizes = {folder: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in kept}
    for folder in kept:
        if sum(sizes.values()) + needed <= limit:
            return
        if _last_used(folder) >= _STARTED:
            break
        shutil.rmtree(folder, ignore_errors=True)
        del sizes[folder]
    if sum(sizes.values()) + needed > limit:
        raise SourceError(
            f"{url}: {needed / 1e9:.2f} GB do not fit the cache of {limit / 1e9:.2f} GB beside the run's other "
            "sources; raise MEGASTAGE_REMOTE_CACHE_GB"
        )


def _last_used(folder: Path) -> float:
    try:
        return (folder / _USED).stat().st_mtime
    except OSError:
        return 0.0


def _download(fs: Any, root: str, files: list[str], folder: Path, url: str) -> None:
    """All files under their names relative to the root's parent; the folder appears whole or not at all."""
    building = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    parent = root.rsplit("/", 1)[0] + "/" if "/" in root else ""
    try:
        for name in files:
            relative = name.removeprefix(parent)
            if ".." in Path(relative).parts or Path(relative).is_absolute():
                raise SourceError(f"{url}: its file {name!r} lies outside of it")
            target = building / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(target))
            if target.stat().st_size != int(fs.size(name)):
                raise SourceError(f"{url}: {name} came incomplete; try again")
        os.rename(building, folder)
    except Exception as error:
        shutil.rmtree(building, ignore_errors=True)
        if folder.is_dir():
            return  # another process was faster
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{url}: cannot be fetched ({type(error).__name__}: {error})") from error
