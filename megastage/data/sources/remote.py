"""Data sets behind URLs (s3://, gs://, ... by the optional package fsspec): copied whole into a bounded local cache.

Training reads at random, which only local files serve well; a data set is therefore fetched once per node, before the
first step. The cache key is the URL with names, sizes and versions of all files, so changed data is fetched again.
"""

from __future__ import annotations

import glob
import hashlib
import re
from pathlib import Path
from typing import Any

from megastage.data.sources.base import SourceError, SourceOptions
from megastage.data.sources.cache import Room, entry

_OF_A_SET = r"(\.bin|\.idx|_token\.npy)$"  # one of several files, named for all
_VERSION_KEYS = (
    "ETag", "etag", "Content-MD5", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "created",
)  # fmt: skip


def fetch(url: str, options: SourceOptions) -> Path:
    """The local path that stands for `url`: a folder, a file, or a prefix of files (as Megatron's p.bin, p.idx).

    Raises SourceError when it cannot be read or does not fit the cache.
    """
    fs, files, root = _files(url)
    versions = _versions(files)

    def build(folder: Path) -> None:
        Room(folder.parent, url).take(sum(size for size, _ in versions.values()))
        _download(fs, root, versions, folder, url)

    digest = hashlib.blake2b(url.encode(), digest_size=16)
    for name, (size, version) in versions.items():
        digest.update(f"{name}\0{size}\0{version}\n".encode())
    folder = entry(f"remote-{digest.hexdigest()}", options, build, f"fetches {url}")
    return folder / root.rsplit("/", 1)[-1]


def _files(url: str) -> tuple[Any, dict[str, dict[str, Any]], str]:
    """(file system, details by path, root): the files below a folder, or one file or prefix with what belongs to it."""
    try:
        import fsspec
    except ImportError:
        raise SourceError(f"{url}: needs the package fsspec (and one for its kind, as s3fs or gcsfs)") from None
    try:
        fs, root = fsspec.core.url_to_fs(url)
        fs.invalidate_cache()  # listings are remembered, also by an earlier call
        root = root.rstrip("/")
        found = fs.find(root, detail=True)
        if not found or root in found:
            prefix = glob.escape(re.sub(_OF_A_SET, "", root))
            found |= fs.glob(f"{prefix}.*", detail=True) | fs.glob(f"{prefix}_*.npy", detail=True)
        # web servers list names alone
        files = {
            name: info if info.get("size") is not None else {**info, **fs.info(name)}
            for name, info in found.items()
            if info.get("type") != "directory"
        }
    except Exception as error:  # every kind of file system raises its own
        raise SourceError(
            f"{url}: cannot be listed ({type(error).__name__}: {error}); check address, credentials and network"
        ) from error
    if not files:
        raise SourceError(f"{url}: no such file or folder, or it is empty")
    for name, info in files.items():
        if info.get("size") is None:
            raise SourceError(f"{url}: the size of {name} is not told, so that a part could be taken for it; copy it")
    return fs, files, root


def _versions(files: dict[str, dict[str, Any]]) -> dict[str, tuple[int, str]]:
    """(size, version as the file system tells it) by path, in order."""
    return {
        name: (int(info["size"]), next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), ""))
        for name, info in sorted(files.items())
    }


def _download(fs: Any, root: str, versions: dict[str, tuple[int, str]], folder: Path, url: str) -> None:
    """All files into `folder`, under their names relative to the root's parent."""
    parent = root.rsplit("/", 1)[0] + "/" if "/" in root else ""
    for name, (size, _) in versions.items():
        relative = name.removeprefix(parent)
        if ".." in Path(relative).parts or Path(relative).is_absolute():
            raise SourceError(f"{url}: its file {name!r} lies outside of it")
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            fs.get_file(name, str(target))
        except Exception as error:  # every kind of file system raises its own
            raise SourceError(
                f"{url}: {name} cannot be fetched ({type(error).__name__}: {error}); try again"
            ) from error
        if target.stat().st_size != size:
            raise SourceError(f"{url}: {name} came with {target.stat().st_size} bytes of {size}; try again")
    if _versions(_files(url)[1]) != versions:
        raise SourceError(f"{url}: its files changed while they were being fetched; leave them alone and try again")
