"""Data sets behind URLs: what is read, what is kept, what is refused."""

import functools
import http.server
import threading

import numpy as np
import pytest
from source_files import documents, ends, flat, write_megatron, write_nanoset, write_saved_dataset

from megastage.data.packed_memmap import PackedMemmapWriter
from megastage.data.sources.base import SourceError, SourceOptions, open_source

fsspec = pytest.importorskip("fsspec")
DOCS = documents(3, 20, low=2, high=12)


@pytest.fixture
def store():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def upload(fs, folder, url):
    for file in folder.rglob("*"):
        if file.is_file():
            fs.pipe(f"{url}/{file.relative_to(folder)}", file.read_bytes())


def tokens(source):
    return source.read(0, source.n_tokens).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """DOCS as a nanoset n, a Megatron pair m/x beside another, a triple t/p, and Arrow files a."""
    folder = tmp_path_factory.mktemp("data")
    write_nanoset(folder / "n", "x", DOCS)
    (folder / "m").mkdir()
    write_megatron(folder / "m" / "x", DOCS)
    write_megatron(folder / "m" / "xy", DOCS[:3])
    (folder / "t").mkdir()
    np.save(folder / "t" / "p_token.npy", np.array(flat(DOCS), np.uint16))
    np.save(folder / "t" / "p_index.npy", ends(DOCS))
    write_saved_dataset(folder / "a", {"input_ids": DOCS})
    return folder


NAMES = [
    ("nanoset", "n"), ("nanoset", "n/x.ds"), ("megatron", "m/x"), ("megatron", "m/x.bin"), ("megatron", "m/x.idx"),
    ("packed_memmap", "t"), ("packed_memmap", "t/p"), ("packed_memmap", "t/p_token.npy"), ("preprocessed", "a"),
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_folders_files_and_prefixes_are_read_as_if_they_were_local(tmp_path, store, folder, scheme):
    upload(store, folder, "/bucket")
    base = "memory://bucket" if scheme == "memory" else f"file://{folder}"
    check(base, folder, tmp_path)


def test_a_web_server_that_lists_names_alone(tmp_path, folder):
    pytest.importorskip("aiohttp", reason="fsspec needs it for http")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        check(f"http://127.0.0.1:{server.server_address[1]}", folder, tmp_path)
        server.shutdown()


def check(base, folder, tmp_path):
    options = SourceOptions(cache_folder=tmp_path / "cache")
    for kind, name in NAMES:
        far, near = open_source(kind, f"{base}/{name}", options), open_source(kind, folder / name)
        assert tokens(far) == flat(DOCS), name
        assert far.fingerprint == near.fingerprint
        assert far.path == f"{base}/{name}"


def test_the_copy_is_used_again_until_the_files_change(tmp_path, store):
    options = SourceOptions(cache_folder=tmp_path / "cache")
    write_nanoset(tmp_path / "n", "x", DOCS)
    upload(store, tmp_path / "n", "/bucket/n")
    open_source("nanoset", "memory://bucket/n", options)
    without = SourceOptions(cache_folder=tmp_path / "cache", may_build=False)
    assert tokens(open_source("nanoset", "memory://bucket/n", without)) == flat(DOCS)
    write_nanoset(tmp_path / "n", "x", DOCS[:-1])
    upload(store, tmp_path / "n", "/bucket/n")
    with pytest.raises(SourceError, match="the first rank of this node fetches memory://bucket/n"):
        open_source("nanoset", "memory://bucket/n", without)
    assert tokens(open_source("nanoset", "memory://bucket/n", options)) == flat(DOCS[:-1])


def test_errors_name_the_url(tmp_path, store):
    options = SourceOptions(cache_folder=tmp_path / "cache")
    with pytest.raises(SourceError, match="memory://bucket/none: no such file"):
        open_source("nanoset", "memory://bucket/none", options)
    with pytest.raises(SourceError, match="nosuch://x/y: cannot be listed"):
        open_source("nanoset", "nosuch://x/y", options)
    store.pipe("/bucket/bad/x.ds", b"123")
    store.pipe("/bucket/bad/x.ds.metadata", b"t|2\n1\n")
    with pytest.raises(SourceError, match=r"memory://bucket/bad/x.ds: 3 bytes"):
        open_source("nanoset", "memory://bucket/bad", options)
    folder = tmp_path / "p"
    with PackedMemmapWriter(folder, "uint16") as writer:
        writer.append([1, 2, 3])
    (folder / "documents.bin").write_bytes(b"\4" + bytes(7))
    upload(store, folder, "/bucket/p")
    with pytest.raises(SourceError, match=r"memory://bucket/p/documents.bin: the last end is 4"):
        open_source("packed_memmap", "memory://bucket/p", options)
    assert not list((tmp_path / "cache").glob(".remote-*"))
