"""Headers, indexes and metadata that contradict the data beside them: each is refused by what the format says twice."""

import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import documents, ends, flat, write_megatron, write_nanoset, write_saved_dataset

from megastage.data.packed_memmap import PackedMemmapWriter, _content_crc32
from megastage.data.sources.base import SourceOptions, open_source

DOCS = documents(3, 20, low=4, high=20)
TOKENS, ENDS, N = flat(DOCS), ends(DOCS), len(DOCS)


def refused(kind, path, words):
    with pytest.raises(ValueError) as error:
        open_source(kind, path, SourceOptions(cache_folder=path / "cache"))
    assert words in str(error.value)
    assert str(path) in str(error.value)


def put(file, at, content):
    old = bytearray(file.read_bytes())
    old[at : at + len(content)] = content
    file.write_bytes(old)


LENGTHS, OFFSETS, BOUNDS = 34, 34 + 4 * N, 34 + 12 * N  # in an .idx of N sequences


@pytest.mark.parametrize(
    ("at", "content", "words"),
    [
        (LENGTHS, struct.pack("<i", -3), "a negative length"),
        (LENGTHS, struct.pack("<i", 2**31 - 1), "sequence 1 is at byte"),
        (OFFSETS + 8, struct.pack("<q", 0), "sequence 1 is at byte 0"),  # two sequences at one place
        (OFFSETS + 8, struct.pack("<q", -2), "sequence 1 is at byte -2"),
        (18, struct.pack("<Q", N - 1), "but its header (19 sequences"),
        (18, struct.pack("<QQ", N + 2, N + 1 - 3), "sequence 0 is at byte"),  # lies that need just the file's size
        (18, struct.pack("<QQ", N - 2, N + 1 + 3), "sequence 0 is at byte"),
        (18, struct.pack("<QQ", 2**64 - 4, N + 7 + 12 * N // 8), "but its header"),
        (BOUNDS, struct.pack("<q", 1), "document bounds must start at 0"),
        (BOUNDS + 8, struct.pack("<q", -1), "document bound 1 is -1"),
        (BOUNDS + 8, struct.pack("<q", 2**62), "document bound 2 is 2, smaller"),
        (BOUNDS + 8 * N, struct.pack("<q", N - 1), "the last document bound is 19"),
        (17, b"\4", "a dtype code that is wrong"),
        (17, b"\6", "dtype code 6"),
        (9, struct.pack("<Q", 2), "version 2"),
    ],
)
def test_megatron(tmp_path, at, content, words):
    write_megatron(tmp_path / "x", DOCS)
    put(tmp_path / "x.idx", at, content)
    refused("megatron", tmp_path, words)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("x.ds.index", lambda c: c[:-8], "the last document end is"),
        ("x.ds.index", lambda c: c + c[-8:-1] + b"\1", "but there are 252 tokens"),
        ("x.ds.index", lambda c: c[8:16] + c[:8] + c[16:], "smaller than the one in front"),
        ("x.ds.index", lambda c: struct.pack("<Q", 2**64 - 1) + c[8:], "document end 1 is"),
        ("x.ds.metadata", lambda c: c.replace(b"|2", b"|4"), "holds 126 tokens of 4 bytes"),
        ("x.ds.metadata", lambda c: b"gpt2|4", "the last document end is 252, but there are 126"),
        ("x.ds.metadata", lambda c: c.replace(b"252", b"251"), "records 251"),
        ("x.ds.metadata", lambda c: c.replace(b"252", b"-252"), "no token count"),
        ("x.ds.loss", lambda c: c[:-1], "251 bytes, but x.ds holds 252 tokens"),
        ("x.ds", lambda c: c + c[-2:], "holds 253 tokens"),
    ],
)
def test_nanoset(tmp_path, name, change, words):
    write_nanoset(tmp_path, "x", DOCS, loss=[1] * len(TOKENS))
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    refused("nanoset", tmp_path, words)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("dtype", "uint32", "tokens.bin: 504 bytes, but metadata.json records 252 n_tokens of 4 bytes"),
        ("dtype", "int16", "dtype 'int16'"),
        ("n_tokens", 251, "tokens.bin: 504 bytes, but metadata.json records 251"),
        ("n_tokens", 2**62, "truncated"),
        ("n_tokens", 252.0, "n_tokens is 252.0"),
        ("n_documents", 19, "documents.bin: 160 bytes, but metadata.json records 19"),
        ("page_bytes", 4, "pages.crc32: 4 bytes, but metadata.json records 126 pages"),
        ("documents_crc32", 0, "documents.bin: CRC-32"),
        ("pages_crc32", 0, "pages.crc32: CRC-32"),
        ("eos_id", 70_000, "eos_id is 70000, expected null or a token id of uint16"),
        ("tokenizer", {"name": "x"}, "tokenizer is {'name': 'x'}"),
        ("tokenizer", {"name": "x", "sha256": None, "vocab_size": True}, "tokenizer.vocab_size is True"),
    ],
)
def test_packed_memmap_metadata_edited_with_its_checksum(tmp_path, key, value, words):
    with PackedMemmapWriter(tmp_path / "p", "uint16") as writer:
        writer.extend(np.array(TOKENS), [len(doc) for doc in DOCS])
    file = tmp_path / "p" / "metadata.json"
    content = {**json.loads(file.read_bytes()), key: value}
    file.write_text(json.dumps(content))
    refused("packed_memmap", tmp_path / "p", "does not match its crc32")
    del content["crc32"]
    file.write_text(json.dumps({**content, "crc32": _content_crc32(content)}))
    refused("packed_memmap", tmp_path / "p", words)


def npy(descr, shape, tail=b""):
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + np.array(TOKENS, "<u2").tobytes() + tail


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (npy("<u2", "(252,)", b"more"), "but its header (shape (252,)) needs"),
        (npy("<u2", "(5,)"), "but its header (shape (5,)) needs"),
        (npy("<u2", "(9999999999999,)"), "not readable as a plain numpy array"),
        (npy("<u2", "(-5,)"), "not readable as a plain numpy array"),
        (npy("<u2", "(10**12,)"), "not readable as a plain numpy array"),
        (npy("<u2", "()"), "needs"),
        (npy(">u2", "(252,)"), "holds >u2, expected little-endian integers"),
        (npy("|b1", "(504,)"), "holds truth values"),
        (npy("|O", "(252,)"), "not readable as a plain numpy array"),
        (npy("<f2", "(252,)"), "holds <f2, expected integers"),
        (npy("<u4", "(126,)"), "the last document end is 252, but there are 126 tokens"),
        (b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + bytes(500), "not readable as a plain numpy array"),
        (b"PK\3\4" + bytes(100), "not readable as a plain numpy array"),
        (b"", "not readable as a plain numpy array"),
    ],
)
def test_numpy_headers(tmp_path, content, words):
    np.save(tmp_path / "x_index.npy", ENDS)
    (tmp_path / "x_token.npy").write_bytes(content)
    refused("packed_memmap", tmp_path, words)


def test_an_archive_of_arrays_is_no_array(tmp_path):
    np.save(tmp_path / "x_index.npy", ENDS)
    np.savez(tmp_path / "x.npz", a=np.array(TOKENS))
    (tmp_path / "x.npz").rename(tmp_path / "x_token.npy")
    refused("packed_memmap", tmp_path, "x_token.npy: not a plain numpy array but NpzFile")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (-ENDS, "document end 0 is"),
        (ENDS[::-1].copy(), "smaller than the one in front"),
        (ENDS.astype(">i8"), "holds >i8, expected little-endian integers"),
        (ENDS.astype(float), "holds <f8, expected integers"),
        (np.stack([ENDS - 1, ENDS], 1), "pairs must be [start, end]"),
        (np.array([2**64 - 1], np.uint64), "document end 0 is -1"),
        (ENDS[:-1], "the last document end is"),
    ],
)
def test_indexes_of_triples(tmp_path, index, words):
    np.save(tmp_path / "x_token.npy", np.array(TOKENS, np.uint16))
    np.save(tmp_path / "x_index.npy", index)
    refused("packed_memmap", tmp_path, words)


def messages(file):
    """Where the messages of an Arrow stream end: schema, batches."""
    with pa.memory_map(str(file)) as source:
        reader, stops = pa.ipc.open_stream(source), []
        stops.append(source.tell())
        for _ in reader:
            stops.append(source.tell())
    return stops


def test_an_arrow_stream_without_its_end_or_with_more_behind_it(tmp_path):
    write_saved_dataset(tmp_path, {"input_ids": DOCS}, shards=1, batch_rows=5)
    file = tmp_path / "data-00001.arrow"
    sound = file.read_bytes()
    for stop in messages(file):
        file.write_bytes(sound[:stop])
        refused("preprocessed", tmp_path, "data-00001.arrow: ends without the mark that ends an Arrow stream")
    for more in (sound, b"\0"):
        file.write_bytes(sound + more)
        refused("preprocessed", tmp_path, "has more data behind the mark")
    file.write_bytes(sound[:-8] + bytes(4))  # as Arrow wrote it before 0.15
    assert open_source("preprocessed", tmp_path).read(0, len(TOKENS)).tolist() == TOKENS


@pytest.mark.parametrize(
    ("rows", "kind", "words"),
    [
        ([[1, 2], None, [3]], pa.list_(pa.int32()), "has empty (null) entries"),
        ([[1, None, 2], [3]], pa.list_(pa.int32()), "has empty (null) entries"),
        ([[1.5, 2.0]], pa.list_(pa.float32()), "holds float, expected integers"),
        ([[True, False]], pa.list_(pa.bool_()), "holds bool, expected integers"),
        ([[[1, 2]]], pa.list_(pa.list_(pa.int32())), ": int32>, expected integers"),
        ([[], []], pa.list_(pa.int32()), "holds 0 tokens"),
        ([1, 2], pa.int32(), "is int32, expected lists"),
    ],
)
@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_columns_that_are_no_lists_of_tokens(tmp_path, rows, kind, words, suffix):
    table = pa.table({"input_ids": pa.array(rows, kind)})
    if suffix == "parquet":
        pq.write_table(table, tmp_path / "x.parquet")
    else:
        with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    refused("preprocessed", tmp_path, words)


def test_a_parquet_footer_that_forgets_rows(tmp_path):
    """One or two bits of each byte of the footer: what is still read is all of it."""
    table = pa.table({"input_ids": pa.array(DOCS, pa.list_(pa.int32()))})
    pq.write_table(table, tmp_path / "x.parquet")
    sound, told = (tmp_path / "x.parquet").read_bytes(), set()
    footer = int.from_bytes(sound[-8:-4], "little") + 8
    places = range(len(sound) - footer, len(sound))
    for at, bit in [(byte, bit) for byte in places for bit in {3, byte % 8}]:
        content = bytearray(sound)
        content[at] ^= 1 << bit
        (tmp_path / "x.parquet").write_bytes(content)
        try:
            source = open_source("preprocessed", tmp_path, SourceOptions(cache_folder=tmp_path / "cache"))
        except ValueError as error:
            told.add("rows" if "are recorded: the file is damaged" in str(error) else "pyarrow")
            continue
        assert source.read(0, source.n_tokens).tolist() == TOKENS, (at, bit)
    assert told == {"rows", "pyarrow"}
