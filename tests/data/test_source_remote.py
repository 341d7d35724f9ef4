"""Data sets behind URLs: what is read, what is kept, what is refused."""

import pytest
from source_files import documents, flat, write_megatron, write_nanoset

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


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_folders_and_prefixes_are_read_as_if_they_were_local(tmp_path, store, scheme):
    options = SourceOptions(cache_folder=tmp_path / "cache")
    write_nanoset(tmp_path / "n", "x", DOCS)
    (tmp_path / "m").mkdir()
    write_megatron(tmp_path / "m" / "x", DOCS)
    base = "memory://bucket" if scheme == "memory" else f"file://{tmp_path}"
    if scheme == "memory":
        for name in ("n", "m"):
            upload(store, tmp_path / name, f"/bucket/{name}")
    for kind, url, local in (("nanoset", f"{base}/n", "n"), ("megatron", f"{base}/m/x", "m/x")):
        far, near = open_source(kind, url, options), open_source(kind, tmp_path / local)
        assert tokens(far) == flat(DOCS)
        assert far.fingerprint == near.fingerprint
        assert far.path == url


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
