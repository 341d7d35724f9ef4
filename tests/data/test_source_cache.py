"""One bound for all that the cache folder holds: what was used longest ago goes, and what this run uses stays."""

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megastage.config.load import load_config
from megastage.data.sources import cache, decoded
from megastage.data.sources.base import SourceError, SourceOptions, open_source
from megastage.startup import source_options

fsspec = pytest.importorskip("fsspec")
TOKENS = np.random.default_rng(0).integers(1, 60_000, 50_000)
LONG_AGO = 1e9


@pytest.fixture(params=["remote", "parquet", "both"])
def opened(request, tmp_path, monkeypatch):
    """open(name, age) for data sets a, b, c of 0.1 to 0.2 MB in the cache, which gives their folders there."""
    monkeypatch.setattr(decoded, "IN_MEMORY_BYTES", 1000)
    options = SourceOptions(cache_folder=tmp_path / "cache")
    fs = fsspec.filesystem("memory")
    sources = {}
    for number, name in enumerate("abc"):
        kind = ("remote", "parquet")[number % 2] if request.param == "both" else request.param
        if kind == "remote":
            fs.pipe(f"/bucket/{name}/x.ds", (TOKENS + number).astype("<u2").tobytes())
            fs.pipe(f"/bucket/{name}/x.ds.metadata", b"t|2\n50000\n")
            sources[name] = ("nanoset", f"memory://bucket/{name}")
        else:
            column = pa.array((TOKENS + number).astype(np.uint16).reshape(-1, 100).tolist(), pa.list_(pa.uint16()))
            pq.write_table(pa.table({"input_ids": column}), tmp_path / f"{name}.parquet")
            sources[name] = ("preprocessed", tmp_path / f"{name}.parquet")

    def open_(name, age=None):
        before = set(options.cache_folder.glob("*"))
        source = open_source(*sources[name], options)
        assert source.read(0, 50_000).tolist() == (TOKENS + "abc".index(name)).tolist()
        (folder,) = set(options.cache_folder.glob("*")) - before or [None]
        if folder is not None and age is not None:
            os.utime(folder, (age, age))
        return folder

    yield open_
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_the_cache_is_bounded_and_what_was_used_longest_ago_goes_first(opened, monkeypatch):
    monkeypatch.setenv("MEGASTAGE_CACHE_GB", "0.00025")
    a, b = opened("a", LONG_AGO), opened("b", LONG_AGO + 1)
    assert opened("a") is None  # there already, and in use from now on
    c = opened("c")
    assert [folder.exists() for folder in (a, b, c)] == [True, False, True]
    assert cache.bytes_in(a.parent) <= 250_000
    with pytest.raises(SourceError, match=r"do not fit the cache of 0.00 GB beside the run's other sources"):
        opened("b")
    assert a.exists()
    assert c.exists()
    assert sorted(a.parent.iterdir()) == sorted([a, c])  # nothing is left of what was begun or removed
    monkeypatch.setenv("MEGASTAGE_CACHE_GB", "0.00005")
    with pytest.raises(SourceError, match=r"\b(b|b\.parquet): 0.00 GB do not fit the cache of 0.00 GB; raise MEGA"):
        opened("b")
    monkeypatch.setenv("MEGASTAGE_CACHE_GB", "plenty")
    with pytest.raises(SourceError, match="MEGASTAGE_CACHE_GB = 'plenty': must be a number"):
        opened("b")


def test_the_variable_comes_before_a_run_s_own_folder(tmp_path, monkeypatch):
    cfg = load_config(["--job.dump_folder", str(tmp_path / "dump")])
    monkeypatch.delenv("MEGASTAGE_CACHE", raising=False)
    assert source_options(cfg, None).cache_folder == tmp_path / "dump" / "cache"
    assert cache.cache_folder(SourceOptions()).name == "megastage"
    monkeypatch.setenv("MEGASTAGE_CACHE", str(tmp_path / "node"))
    assert source_options(cfg, None).cache_folder == tmp_path / "node"
    assert cache.cache_folder(SourceOptions(cache_folder=tmp_path / "mine")) == tmp_path / "mine"


def test_other_things_in_the_folder_are_neither_counted_nor_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGASTAGE_CACHE_GB", "1e-6")
    others = [tmp_path / f"other-{'0' * 32}", tmp_path / "decoded-short", tmp_path / f".text-{'0' * 32}-host-1-2"]
    for folder in [*others, *(tmp_path / f"{kind}-{'0' * 32}" for kind in ("decoded", "live", "remote", "text"))]:
        folder.mkdir()
        (folder / "file").write_bytes(bytes(2000))
        os.utime(folder, (LONG_AGO, LONG_AGO))
    cache.Room(tmp_path, "new").take(1000)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_what_a_kill_left_of_a_removal_is_cleared_away(tmp_path, monkeypatch):
    entry = tmp_path / f"remote-{'1' * 32}"
    entry.mkdir()
    (entry / "file").write_bytes(bytes(2000))
    monkeypatch.setattr(cache.shutil, "rmtree", lambda *_, **__: None)  # as if killed behind the rename
    cache._remove(entry)
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f".remote-{'1' * 32}-")
    monkeypatch.setattr(cache, "_is_running", lambda pid: False)
    cache.clear_abandoned(tmp_path, "remote")
    assert not list(tmp_path.iterdir())
