"""Large Parquet files, compressed text, recorded types and loss masks: what is read, and what is refused."""

import gzip
import json
import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from source_files import (
    FakeStage,
    documents,
    ends,
    flat,
    write_megatron,
    write_nanoset,
    write_saved_dataset,
)

from megastage.data.engine import DataEngine
from megastage.data.packed_memmap import PackedMemmapWriter
from megastage.data.sources import columnar, decoded, text
from megastage.data.sources.base import SourceError, SourceOptions, open_source

DOCS = documents(6, 400, low=2, high=60)


@pytest.fixture
def parquet(tmp_path):
    table = pa.table({"input_ids": pa.array(DOCS, pa.list_(pa.int32())), "text": ["x" * 50] * 400})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=130, compression="zstd")
    return tmp_path / "x.parquet"


def test_a_large_parquet_file_is_decoded_once_and_mapped(tmp_path, parquet, monkeypatch):
    small = open_source("preprocessed", parquet, SourceOptions(cache_folder=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(decoded, "IN_MEMORY_BYTES", 1000)
    readers = SourceOptions(cache_folder=tmp_path / "cache", may_build=False)
    with pytest.raises(SourceError, match=r"missing; the first rank of this node decodes .*x.parquet"):
        open_source("preprocessed", parquet, readers)
    source = open_source("preprocessed", parquet, SourceOptions(cache_folder=tmp_path / "cache"))
    (folder,) = (tmp_path / "cache").iterdir()
    assert [file.name for file in folder.iterdir()] == ["rows.arrow"]
    for each in (source, open_source("preprocessed", parquet, readers)):
        assert each.read(0, each.n_tokens).tolist() == flat(DOCS)
        assert each.doc_ends.tolist() == ends(DOCS).tolist()
        assert each.fingerprint == small.fingerprint
    pq.write_table(pa.table({"input_ids": pa.array(DOCS[1:], pa.list_(pa.int32()))}), parquet)
    with pytest.raises(SourceError, match="missing; the first rank"):
        open_source("preprocessed", parquet, readers)


def test_repeated_values_are_seen_to_be_large(tmp_path, monkeypatch):
    rows = pa.array([[7] * 5000] * 200, pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": rows}), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 50_000
    monkeypatch.setattr(decoded, "IN_MEMORY_BYTES", 1 << 20)
    source = open_source("preprocessed", tmp_path / "x.parquet", SourceOptions(cache_folder=tmp_path / "cache"))
    assert source.n_tokens == 10**6
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_many_small_files_take_no_more_memory_than_one(tmp_path, monkeypatch):
    """The bound is that of the data set: what comes when it is used up goes to the cache, however small it is."""
    for number in range(5):
        column = pa.array([[number] * 100] * 100, pa.list_(pa.int32()))  # 40 kB, of which the file takes 1
        pq.write_table(pa.table({"input_ids": column}), tmp_path / f"{number}.parquet")
    monkeypatch.setattr(decoded, "IN_MEMORY_BYTES", 100_000)
    source = open_source("preprocessed", tmp_path, SourceOptions(cache_folder=tmp_path / "cache"))
    assert source.read(0, 50_000).tolist() == [number for number in range(5) for _ in range(10_000)]
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("form", [pa.ipc.new_stream, pa.ipc.new_file])
def test_compressed_arrow_files_are_bounded_in_memory_too(tmp_path, monkeypatch, codec, form):
    table = pa.table({"input_ids": pa.array(DOCS, pa.list_(pa.int32()))})
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, form(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=50)
    for bound, kept in ((1 << 20, 0), (1000, 1)):
        monkeypatch.setattr(decoded, "IN_MEMORY_BYTES", bound)
        before = pa.total_allocated_bytes()
        source = open_source("preprocessed", tmp_path / "x.arrow", SourceOptions(cache_folder=tmp_path / "cache"))
        assert source.read(0, source.n_tokens).tolist() == flat(DOCS)
        assert (pa.total_allocated_bytes() > before) == (not kept)
        assert len(list(tmp_path.glob("cache/*"))) == kept
        del source


def test_each_file_is_decoded_once_and_later_known_by_its_footer(tmp_path, parquet, monkeypatch):
    decodings = []
    original = columnar._parquet_batches
    monkeypatch.setattr(columnar, "_parquet_batches", lambda *a: decodings.append(a) or original(*a))
    options = SourceOptions(cache_folder=tmp_path / "cache")
    for bound, expected in ((1 << 20, 1), (1000, 1), (1000, 0)):  # in memory, to the cache, from the cache
        monkeypatch.setattr(decoded, "IN_MEMORY_BYTES", bound)
        decodings.clear()
        open_source("preprocessed", parquet, options)
        assert len(decodings) == expected


def test_an_edit_in_place_is_noticed_whatever_its_times_say(tmp_path, parquet, monkeypatch):
    monkeypatch.setattr(decoded, "IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(decoded, "_FOOTER_BYTES", 100)
    options = SourceOptions(cache_folder=tmp_path / "cache")
    open_source("preprocessed", parquet, options)
    facts = parquet.stat()
    time.sleep(0.02)  # the clock of a file system may stand still that long
    with open(parquet, "r+b") as file:
        file.write(bytes(1000))
    os.utime(parquet, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(SourceError, match=r"x\.parquet: not readable"):
        open_source("preprocessed", parquet, options)


def test_a_damaged_large_file_leaves_nothing_in_the_cache(tmp_path, parquet, monkeypatch):
    monkeypatch.setattr(decoded, "IN_MEMORY_BYTES", 1000)
    content = bytearray(parquet.read_bytes())
    content[4:12] = b"\xff" * 8  # the first page's header
    parquet.write_bytes(content)
    with pytest.raises(SourceError, match=r"x\.parquet: not readable as \.parquet"):
        open_source("preprocessed", parquet, SourceOptions(cache_folder=tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def lines(count):
    return "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(count)).encode()


def texts(file):
    return list(text.documents([file], "text"))


def test_every_member_and_frame_of_compressed_text_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    content = lines(5000)
    half = len(content) // 2
    want = [f"line {i}" for i in range(5000)]
    for name, compress in (("gz", gzip.compress), ("zst", zstandard.compress)):
        file = tmp_path / f"x.jsonl.{name}"
        file.write_bytes(compress(content[:half]) + compress(content[half:]))
        assert texts(file) == want
        file.write_bytes(b"".join(compress(content[i : i + 50]) for i in range(0, len(content), 50)))
        assert texts(file) == want


@pytest.mark.parametrize("name", ["gz", "zst"])
def test_compressed_text_that_ends_early_or_is_empty_is_refused(tmp_path, name):
    zstandard = pytest.importorskip("zstandard")
    compress = gzip.compress if name == "gz" else zstandard.compress
    whole = compress(lines(5000))
    file = tmp_path / f"x.jsonl.{name}"
    for size in (0, 1, 5, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(SourceError, match=rf"x.jsonl.{name}: (empty|damaged|the zstd data end early)"):
            texts(file)


def test_text_in_arrow_with_damaged_row_offsets_is_refused_not_followed(tmp_path):
    file = tmp_path / "x.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, pa.schema({"text": pa.string()})) as writer:
        writer.write_batch(pa.record_batch({"text": ["one", "three", "seven"]}))
    content = file.read_bytes()
    offsets = np.array([0, 3, 8, 13], "<i4").tobytes()
    assert content.count(offsets) == 1
    for wrong in ([0, 3, 1 << 30, 13], [0, -5, 8, 13], [0, 9, 8, 13], [1 << 30, 3, 8, 13]):
        file.write_bytes(content.replace(offsets, np.array(wrong, "<i4").tobytes()))
        with pytest.raises(SourceError, match=r"x\.arrow: column 'text' is damaged"):
            texts(file)


def test_text_that_is_not_utf8_in_columns_is_refused(tmp_path):
    pq.write_table(pa.table({"text": pa.array([b"good", b"b\xff\xfed"]).view(pa.string())}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=r"x\.parquet: column 'text' is damaged"):
        texts(tmp_path / "x.parquet")


def write_wide_and_narrow(folder, kind):
    """The same documents as 2 and as 4 bytes a token in one folder, as a mistaken merge leaves them."""
    if kind == "nanoset":
        write_nanoset(folder, "a", DOCS, size=2)
        write_nanoset(folder, "b", DOCS, size=4)
    elif kind == "megatron":
        write_megatron(folder / "a", DOCS, code=8)
        write_megatron(folder / "b", DOCS, code=4)
    elif kind == "packed_memmap":
        for name, dtype in (("a", "uint16"), ("b", "uint32")):
            with PackedMemmapWriter(folder / name, dtype) as writer:
                writer.extend(np.array(flat(DOCS)), [len(doc) for doc in DOCS])
    elif kind == "triples":
        for name, dtype in (("a", np.uint16), ("b", np.uint32)):
            np.save(folder / f"{name}_token.npy", np.array(flat(DOCS), dtype))
            np.save(folder / f"{name}_index.npy", ends(DOCS))
    else:
        for name, dtype in (("a", pa.uint16()), ("b", pa.uint32())):
            write_saved_dataset(folder, {"input_ids": DOCS}, shards=1, types={"input_ids": pa.list_(dtype)})
            (folder / "data-00001.arrow").rename(folder / f"{name}.arrow")
            (folder / "state.json").unlink()


@pytest.mark.parametrize("kind", ["nanoset", "megatron", "packed_memmap", "triples", "preprocessed"])
def test_files_of_different_types_in_one_source_are_an_error(tmp_path, kind):
    write_wide_and_narrow(tmp_path, kind)
    with pytest.raises(SourceError, match="hold tokens of different types"):
        open_source("packed_memmap" if kind == "triples" else kind, tmp_path)


def test_the_recorded_type_decides_and_must_fit_the_sizes(tmp_path):
    write_nanoset(tmp_path / "n", "x", DOCS, size=4)
    assert open_source("nanoset", tmp_path / "n").dtype == np.uint32
    metadata = tmp_path / "n" / "x.ds.metadata"
    for recorded in (f"gpt2|2\n{len(flat(DOCS))}\n", "gpt2|2"):  # without a count the index tells
        metadata.write_text(recorded)
        with pytest.raises(SourceError, match=r"x.ds"):
            open_source("nanoset", tmp_path / "n")
    write_megatron(tmp_path / "m", DOCS, code=4)
    assert open_source("megatron", tmp_path / "m").dtype == np.int32
    content = bytearray((tmp_path / "m.idx").read_bytes())
    content[17] = 8
    (tmp_path / "m.idx").write_bytes(content)
    with pytest.raises(SourceError, match=r"m.idx: .*a dtype code that is wrong"):
        open_source("megatron", tmp_path / "m")
    with PackedMemmapWriter(tmp_path / "p", "uint32") as writer:
        writer.extend(np.array(flat(DOCS)), [len(doc) for doc in DOCS])
    assert open_source("packed_memmap", tmp_path / "p").dtype == np.uint32
    metadata = tmp_path / "p" / "metadata.json"
    metadata.write_text(metadata.read_text().replace("uint32", "uint16"))
    with pytest.raises(ValueError, match=r"metadata.json: its content does not match its crc32"):
        open_source("packed_memmap", tmp_path / "p")


def test_the_loss_file_of_a_nanoset_decides_the_targets_of_a_run(tmp_path):
    """Every token is its own place in the stream here, so labels can be told from inputs alone."""
    rng = np.random.default_rng(4)
    lengths = rng.integers(1, 40, 150)
    stream = np.arange(int(lengths.sum()))
    docs = [part.tolist() for part in np.split(stream, np.cumsum(lengths)[:-1])]
    counts = rng.integers(0, 2, stream.size)
    write_nanoset(tmp_path, "x", docs, size=4, loss=counts.tolist())
    last = set((np.cumsum(lengths) - 1).tolist())
    stage = FakeStage(dataset_path=str(tmp_path), seq_len=32)
    engine = DataEngine.build([stage])
    engine.enter(0, data_rank=0, data_ranks=1)
    masked = 0
    for _ in range(6):
        batch = engine.next()
        want = torch.full_like(batch.labels_BT, -100)
        for r, row in enumerate(batch.tokens_BT.tolist()):
            for c, token in enumerate(row):
                if token not in last and counts[token + 1]:
                    want[r, c] = token + 1
                masked += token not in last and not counts[token + 1]
        assert torch.equal(batch.labels_BT, want)
    engine.close()
    assert masked > 300
