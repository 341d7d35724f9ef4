import json
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import documents, ends, flat, write_megatron, write_saved_dataset

from megastage.data.packed_memmap import PackedMemmapWriter, TokenizerFacts
from megastage.data.sources.base import SourceError, SourceOptions, open_source


def all_ends(source):
    return source.document_ends(np.array([0]), np.array([source.n_tokens]))[1].tolist()


# --- packed_memmap -----------------------------------------------------------


def write_packed(folder, docs, *, eos=None, vocab=None):
    facts = TokenizerFacts("toy", "ab" * 32, vocab) if vocab else None
    with PackedMemmapWriter(folder, "uint16", eos_id=eos, tokenizer=facts) as writer:
        for doc in docs:
            writer.append(np.array(doc))
    return folder


def test_packed_memmap_folder(tmp_path):
    docs = documents(1, 30)
    source = open_source("packed_memmap", write_packed(tmp_path / "p", docs, eos=7, vocab=600))
    assert source.kind == "documents"
    assert source.read(0, source.n_tokens).tolist() == flat(docs)
    assert source.doc_ends.tolist() == ends(docs).tolist()
    assert (source.eos_id, source.vocab_size, source.tokenizer_hash) == (7, 600, "ab" * 32)


def test_folder_of_packed_folders_is_one_stream(tmp_path):
    a, b = documents(1, 8), documents(2, 8)
    write_packed(tmp_path / "two", b)
    write_packed(tmp_path / "one", a)
    source = open_source("packed_memmap", tmp_path)
    assert source.read(0, source.n_tokens).tolist() == flat(a + b)
    assert source.doc_ends.tolist() == ends(a + b).tolist()


def write_triple(prefix, docs, mask, index):
    np.save(f"{prefix}_token.npy", np.array(flat(docs), np.uint16))
    if mask is not None:
        np.save(f"{prefix}_mask.npy", np.array(mask, np.uint8))
    if index is not None:
        np.save(f"{prefix}_index.npy", np.array(index))


@pytest.mark.parametrize("form", ["ends", "bounds", "starts", "pairs"])
def test_old_triples_with_every_form_of_index(tmp_path, form):
    docs = documents(3, 12)
    stop = ends(docs)
    start = stop - [len(doc) for doc in docs]
    index = {"ends": stop, "bounds": [0, *stop], "starts": start, "pairs": np.stack([start, stop], 1)}[form]
    mask = np.random.default_rng(0).integers(0, 2, len(flat(docs)))
    write_triple(tmp_path / "train", docs, mask, index)
    for path in (tmp_path / "train", tmp_path, tmp_path / "train_token.npy"):
        source = open_source("packed_memmap", path)
        assert source.read(0, source.n_tokens).tolist() == flat(docs)
        assert source.doc_ends.tolist() == stop.tolist()
        assert source.loss_mask(0, source.n_tokens).tolist() == mask.astype(bool).tolist()


def test_old_triples_of_rows_need_no_index(tmp_path):
    rows = np.arange(1, 41, dtype=np.uint32).reshape(5, 8)
    np.save(tmp_path / "x_token.npy", rows)
    source = open_source("packed_memmap", tmp_path / "x")
    assert source.doc_ends.tolist() == [8, 16, 24, 32, 40]


def test_pickled_arrays_are_refused_unread(tmp_path):
    np.save(tmp_path / "x_token.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(SourceError, match=r"x_token.npy: not readable as a plain numpy array"):
        open_source("packed_memmap", tmp_path / "x")


@pytest.mark.parametrize(
    ("token", "mask", "index", "words"),
    [
        ([1, 2, 3, 4], [1, 1, 1], [4], "x_mask.npy: shape (3,), but x_token.npy has (4,)"),
        ([1, 2, 3, 4], [1, 1, 1, 9], [4], "must hold one byte a token, 1 = counts"),
        ([1, 2, 3, 4], None, [2, 1, 4], "document end 1 is 1, smaller"),
        ([1, 2, 3, 4], None, [2, 9], "the last document end is 9, but there are 4 tokens"),
        ([1, 2, 3, 4], None, None, "x_index.npy: missing"),
        ([1.5, 2.5], None, [2], "holds <f8, expected integers"),
        ([1, 2, 3, 4], None, [[0, 2], [3, 4]], "pairs must be [start, end] of documents one after the other"),
    ],
)
def test_bad_triples(tmp_path, token, mask, index, words):
    np.save(tmp_path / "x_token.npy", np.array(token))
    if mask is not None:
        np.save(tmp_path / "x_mask.npy", np.array(mask, np.uint8))
    if index is not None:
        np.save(tmp_path / "x_index.npy", np.array(index))
    with pytest.raises(SourceError) as error:
        open_source("packed_memmap", tmp_path / "x")
    assert words in str(error.value)


# --- megatron ----------------------------------------------------------------


@pytest.mark.parametrize("code", [4, 5, 8])
@pytest.mark.parametrize("sequences", [1, 3])
def test_megatron_pair(tmp_path, code, sequences):
    docs = documents(4, 20, low=3)
    write_megatron(tmp_path / "d", docs, code=code, sequences_per_doc=sequences)
    for path in (tmp_path / "d", tmp_path / "d.bin", tmp_path / "d.idx", tmp_path):
        source = open_source("megatron", path)
        assert source.kind == "stream"
        assert source.read(0, source.n_tokens).tolist() == flat(docs)
        assert source.doc_ends.tolist() == ends(docs).tolist()


def test_megatron_folder_joins_pairs(tmp_path):
    a, b = documents(1, 5), documents(2, 6)
    write_megatron(tmp_path / "b", b)
    write_megatron(tmp_path / "a", a)
    source = open_source("megatron", tmp_path)
    assert source.read(0, source.n_tokens).tolist() == flat(a + b)
    assert source.doc_ends.tolist() == ends(a + b).tolist()


def test_same_content_has_one_fingerprint_in_two_formats(tmp_path):
    from source_files import write_nanoset

    docs = documents(9, 25)
    a = open_source("megatron", write_megatron(tmp_path / "m", docs))
    b = open_source("nanoset", write_nanoset(tmp_path / "n", "x", docs))
    assert a.fingerprint == b.fingerprint


def _patch(file, offset, kind, value):
    content = bytearray(file.read_bytes())
    struct.pack_into(kind, content, offset, value)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda i, b: i.write_bytes(b"PK" + i.read_bytes()[2:]), "this is no megatron index"),
        (lambda i, b: i.write_bytes(b""), "shorter than the header"),
        (lambda i, b: i.write_bytes(i.read_bytes()[:-1]), "needs 342; truncated or damaged"),
        (lambda i, b: _patch(i, 9, "<Q", 2), "version 2, this program reads version 1"),
        (lambda i, b: _patch(i, 17, "<B", 6), "dtype code 6; tokens must be of code 1, 2, 3, 4, 5, 8"),
        (lambda i, b: _patch(i, 17, "<B", 4), "damaged, or a dtype code that is wrong"),
        (lambda i, b: _patch(i, 18, "<Q", 1 << 60), "truncated or damaged"),
        (lambda i, b: _patch(i, 34, "<i", -4), "a negative length"),
        (lambda i, b: _patch(i, 34 + 4 * 15 + 8, "<q", 3), "sequence 1 is at byte 3, expected"),
        (lambda i, b: _patch(i, 34 + 12 * 15, "<q", 1), "document bounds must start at 0"),
        (
            lambda i, b: _patch(i, len(i.read_bytes()) - 8, "<q", 99),
            "the last document bound is 99, but there are 15 sequences",
        ),
        (lambda i, b: b.unlink(), "d.bin: no such file"),
        (lambda i, b: b.write_bytes(b.read_bytes()[:-2]), "the last sequence end is"),
        (lambda i, b: b.write_bytes(b.read_bytes()[:-1]), "no whole number of 2-byte items"),
    ],
)
def test_bad_megatron_files(tmp_path, spoil, words):
    prefix = write_megatron(tmp_path / "d", [[1 + n] * 6 for n in range(15)])
    idx, data = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    spoil(idx, data)
    with pytest.raises(SourceError) as error:
        open_source("megatron", prefix)
    assert words in str(error.value)


# --- preprocessed ------------------------------------------------------------


def test_ragged_rows_are_documents(tmp_path):
    docs = documents(5, 40)
    source = open_source("preprocessed", write_saved_dataset(tmp_path, {"input_ids": docs}))
    assert source.kind == "documents"
    assert source.read(0, source.n_tokens).tolist() == flat(docs)
    assert source.doc_ends.tolist() == ends(docs).tolist()
    rng = np.random.default_rng(0)
    for start, stop in np.sort(rng.integers(0, source.n_tokens + 1, (100, 2)), axis=1).tolist():
        assert source.read(start, stop).tolist() == flat(docs)[start:stop]


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.uint16()), pa.list_(pa.int32(), 12)])
def test_list_types(tmp_path, kind):
    rows = np.random.default_rng(0).integers(1, 99, (20, 12)).tolist()
    source = open_source("preprocessed", write_saved_dataset(tmp_path, {"input_ids": rows}, types={"input_ids": kind}))
    assert source.read(0, source.n_tokens).tolist() == flat(rows)
    assert source.doc_ends.tolist() == list(range(12, 241, 12))


def test_other_files_of_arrow_and_parquet(tmp_path):
    docs = documents(6, 30)
    table = pa.table({"input_ids": pa.array(docs, pa.list_(pa.int32())), "text": ["x"] * 30})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow"):
        source = open_source("preprocessed", tmp_path / name)
        assert source.read(0, source.n_tokens).tolist() == flat(docs)
        assert source.doc_ends.tolist() == ends(docs).tolist()
    assert open_source("preprocessed", tmp_path).n_documents == 60


def packed_rows(seed, n, length, eos):
    """Rows of documents cut at the row's end, with what other programs store beside them."""
    rng = np.random.default_rng(seed)
    rows, lengths, positions = [], [], []
    for _ in range(n):
        row, sizes = [], []
        while len(row) < length:
            size = min(int(rng.integers(2, 8)), length - len(row))
            row += [*rng.integers(10, 99, size - 1).tolist(), eos]
            sizes.append(size)
        rows.append(row)
        lengths.append(sizes)
        positions.append([i for size in sizes for i in range(size)])
    return rows, lengths, positions


@pytest.mark.parametrize("by", ["position_ids", "sequence_lengths", "eos", "nothing"])
def test_packed_rows_stay_whole_and_know_their_documents(tmp_path, by):
    rows, lengths, positions = packed_rows(1, 20, 12, 3)
    columns = {"input_ids": rows}
    if by in ("position_ids", "sequence_lengths"):
        columns[by] = positions if by == "position_ids" else lengths
    eos = 3 if by == "eos" else None
    source = open_source("preprocessed", write_saved_dataset(tmp_path, columns), SourceOptions(eos_id=eos))
    assert source.doc_ends.tolist() == list(range(12, 241, 12))  # what packing keeps together
    want = list(range(12, 241, 12)) if by == "nothing" else np.cumsum(flat(lengths)).tolist()
    assert all_ends(source) == want
    assert source.labels(0, 5) is None


def test_a_mask_without_zeros_says_nothing(tmp_path):
    docs = documents(3, 30)
    masks = [[1] * len(doc) for doc in docs]
    source = open_source("preprocessed", write_saved_dataset(tmp_path, {"attention_mask": masks, "input_ids": docs}))
    assert source.read(0, source.n_tokens).tolist() == flat(docs)


def test_unshifted_labels_become_a_loss_mask(tmp_path):
    docs = documents(7, 20, low=4)
    labels = [[-100, *doc[1:]] for doc in docs]
    source = open_source("preprocessed", write_saved_dataset(tmp_path, {"input_ids": docs, "labels": labels}))
    want = [i > 0 for doc in docs for i in range(len(doc))]
    assert source.loss_mask(0, source.n_tokens).tolist() == want
    assert source.labels(0, 5) is None


def test_shifted_labels_are_kept_as_they_are(tmp_path):
    text = np.random.default_rng(1).integers(1, 99, (10, 9)).tolist()
    inputs, labels = [row[:-1] for row in text], [row[1:] for row in text]
    labels[2][3] = -100
    positions = [[0, 1, 2, 0, 1, 2, 3, 4]] * 10
    columns = {"inputs": inputs, "labels": labels, "position_ids": positions, "sequence_lengths": [[3, 5]] * 10}
    source = open_source("preprocessed", write_saved_dataset(tmp_path, columns))
    assert source.read(0, source.n_tokens).tolist() == flat(inputs)
    assert source.labels(0, source.n_tokens).tolist() == flat(labels)
    assert source.doc_ends.tolist() == list(range(8, 81, 8))
    assert all_ends(source) == list(range(3, 80, 8))  # what lies behind a row's end is known by its label


def test_rows_with_one_token_more_keep_it_as_a_label(tmp_path):
    rows, lengths, positions = packed_rows(2, 16, 17, 3)
    source = open_source("preprocessed", write_saved_dataset(tmp_path, {"input_ids": rows, "position_ids": positions}))
    assert source.n_tokens == 16 * 16
    assert source.read(0, 256).tolist() == flat([row[:-1] for row in rows])
    assert source.read(10, 50).tolist() == flat([row[:-1] for row in rows])[10:50]
    assert source.labels(0, 256).tolist() == flat([row[1:] for row in rows])
    assert source.doc_ends.tolist() == list(range(16, 257, 16))
    want = [r * 16 + e for r, sizes in enumerate(lengths) for e in np.cumsum(sizes).tolist() if e < 17]
    assert all_ends(source) == want


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"ids": [[1, 2]]}, "neither column 'input_ids' nor 'inputs'"),
        ({"input_ids": [[1, 2]], "inputs": [[1, 2]]}, "both columns 'input_ids' and 'inputs'"),
        ({"inputs": [[1, 2], [3, 4]]}, "column 'inputs' without 'labels'"),
        (
            {"input_ids": [[1, 2, 3]], "labels": [[1, 2]]},
            "column 'labels' and the tokens have rows of different lengths",
        ),
        ({"input_ids": [[1, 2, 3, 4]], "labels": [[9, 8, 7, 6]]}, "cannot tell whether 'labels' are shifted"),
        ({"input_ids": [[5, 5, 5, 5]], "labels": [[5, 5, 5, 5]]}, "of 0 usable positions"),
        (
            {"input_ids": [[1, 2, 3, 4]] * 2, "labels": [[1, 2, 3, 4], [2, 3, 4, 5]]},
            "3 equal their own token and 3 the",
        ),
        (
            {"input_ids": [[1, 2, 3]] * 2, "position_ids": [[0, 1, 7]] * 2},
            "'position_ids' jump to another value than 0",
        ),
        ({"input_ids": [[1, 2, 3]] * 2, "sequence_lengths": [[1, 1], [3]]}, "do not sum to its length"),
        ({"input_ids": [[1, 2, 3]] * 2, "sequence_lengths": [[], [6]]}, "do not sum to its length"),
        ({"input_ids": [[1], None]}, "has empty (null) entries"),
        ({"input_ids": [[]]}, "holds 0 tokens"),
        ({"input_ids": [[5, 6, 0, 0]] * 3, "attention_mask": [[1, 1, 0, 0]] * 3}, "rows are padded"),
    ],
)
def test_bad_columns(tmp_path, columns, words):
    write_saved_dataset(tmp_path, columns, shards=1)
    with pytest.raises(SourceError) as error:
        open_source("preprocessed", tmp_path)
    assert words in str(error.value)


def test_bad_saved_folders(tmp_path):
    write_saved_dataset(tmp_path / "train", {"input_ids": documents(1, 10)})
    with pytest.raises(SourceError, match="it holds the splits train: name one of them"):
        open_source("preprocessed", tmp_path)
    (tmp_path / "train" / "data-00001.arrow").unlink()
    with pytest.raises(SourceError, match=r"lists data-00001.arrow, which is missing"):
        open_source("preprocessed", tmp_path / "train")
    (tmp_path / "train" / "state.json").write_text("{")
    with pytest.raises(SourceError, match=r"state.json: not readable"):
        open_source("preprocessed", tmp_path / "train")


def test_text_columns_are_no_tokens(tmp_path):
    write_saved_dataset(tmp_path, {"input_ids": ["a", "b"]}, types={"input_ids": pa.string()})
    with pytest.raises(SourceError, match="column 'input_ids' is string, expected lists of integers"):
        open_source("preprocessed", tmp_path)


def test_hugging_face_writes_what_we_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    docs = documents(8, 50)
    datasets.Dataset.from_dict({"input_ids": docs}).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    assert len(json.loads((tmp_path / "saved" / "state.json").read_bytes())["_data_files"]) == 3
    source = open_source("preprocessed", tmp_path / "saved")
    assert source.read(0, source.n_tokens).tolist() == flat(docs)


@pytest.mark.parametrize("kind", ["nanoset", "megatron"])
def test_the_tools_write_what_the_trainer_reads(tmp_path, kind):
    from megastage.preprocess.megatron import MegatronWriter
    from megastage.preprocess.nanoset import NanosetWriter

    docs = documents(12, 30)
    writer = {"nanoset": NanosetWriter, "megatron": MegatronWriter}[kind](tmp_path / "out", "uint16")
    writer.extend(np.array(flat(docs)), np.array([len(doc) for doc in docs]))
    writer.finish()
    source = open_source(kind, tmp_path / "out")
    assert source.read(0, source.n_tokens).tolist() == flat(docs)
    assert source.doc_ends.tolist() == ends(docs).tolist()
