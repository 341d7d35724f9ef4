"""Files that megatron-core and datatrove wrote are read as their own readers read them."""

import warnings

import numpy as np
import pytest
import torch

from megastage.data.batch import assemble
from megastage.data.order import Rows
from megastage.data.sources.base import open_source

RNG = np.random.default_rng(0)
DOCS = [RNG.integers(1, 100, RNG.integers(1, 30)) for _ in range(40)]
ENDS = np.cumsum([len(doc) for doc in DOCS])


def rows_of(source, starts, length):
    """Batch of the given windows."""
    B = len(starts)
    rows = Rows(np.arange(B + 1), np.asarray(starts), np.full(B, length))
    zeros = np.zeros(B, np.int64)
    return assemble([source], zeros, np.arange(B), rows, seq_len=length, document_mask=True, vocab_size=100)


@pytest.fixture(scope="module")
def indexed():
    warnings.simplefilter("ignore")
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="needs the extra bench")


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_megatron_core(tmp_path, indexed, dtype):
    """Documents of one sequence and of several."""
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype)
    for number, doc in enumerate(DOCS):
        parts = [part for part in np.array_split(doc, 1 + number % 3) if len(part)]
        builder.add_document(doc, [len(part) for part in parts])
    builder.finalize(str(tmp_path / "x.idx"))
    theirs, ours = indexed.IndexedDataset(str(tmp_path / "x")), open_source("megatron", tmp_path / "x")
    assert ours.dtype == dtype
    whole = np.concatenate([theirs[i] for i in range(len(theirs))])
    assert np.array_equal(ours.read(0, ours.n_tokens), whole)
    assert ours.doc_ends.tolist() == ENDS.tolist()
    ends = np.cumsum(theirs.sequence_lengths)[np.asarray(theirs.document_indices[1:]) - 1]
    assert ours.doc_ends.tolist() == ends.tolist()
    joined = indexed.IndexedDatasetBuilder(str(tmp_path / "two.bin"), dtype=dtype)
    for _ in range(2):
        joined.add_index(str(tmp_path / "x"))
    joined.finalize(str(tmp_path / "two.idx"))
    two = open_source("megatron", tmp_path / "two")
    assert np.array_equal(two.read(0, two.n_tokens), np.tile(whole, 2))
    assert two.doc_ends.tolist() == np.concatenate([ENDS, ENDS + ENDS[-1]]).tolist()


def test_megatron_core_documents_without_a_token(tmp_path, indexed):
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.uint16)
    builder.add_document([1, 2], [2])
    builder.end_document()  # of no sequence
    builder.add_document([3], [1])
    builder.add_item(torch.tensor([], dtype=torch.int32))
    builder.end_document()  # of a sequence of no token
    builder.add_document([4, 5], [2])
    builder.finalize(str(tmp_path / "x.idx"))
    source = open_source("megatron", tmp_path / "x")
    assert source.read(0, 5).tolist() == [1, 2, 3, 4, 5]
    assert source.doc_ends.tolist() == [2, 2, 3, 3, 5]
    batch = rows_of(source, [0], 4)
    assert batch.cu_seqlens_BC.tolist() == [[0, 2, 3, 4]]
    assert batch.labels_BT.tolist() == [[2, -100, -100, 5]]


@pytest.fixture(scope="module")
def datatrove():
    return pytest.importorskip("datatrove.pipeline.tokens.tokenizer", reason="needs the extra bench")


@pytest.mark.parametrize("token_size", [2, 4])
@pytest.mark.parametrize("shuffled", [False, True])
def test_datatrove(tmp_path, datatrove, token_size, shuffled):
    """Tokens, documents, loss masks; windows with positions as their reader gives them."""
    from datatrove.utils.dataset import DatatroveFileDataset

    loss = [RNG.integers(0, 2, len(doc)).astype(bool) for doc in DOCS]
    file = datatrove.TokenizedFile(
        str(tmp_path), "00000.ds", save_loss_metadata=True, tokenizer_name_or_path="gpt2", save_final_metadata=True,
        token_size=token_size,
    )  # fmt: skip
    for doc, mask in zip(DOCS, loss):
        file.write(doc.tolist(), mask)
    order = np.random.default_rng(1).permutation(40) if shuffled else np.arange(40)
    if shuffled:
        file.tokens_file.flush()
        file.loss_file.flush()
        file.copy("x", order)
        file.cleanup()
    else:
        file.close()
    (path,) = tmp_path.glob("*.ds")
    source = open_source("nanoset", tmp_path)
    assert source.dtype.itemsize == token_size
    assert source.read(0, source.n_tokens).tolist() == np.concatenate([DOCS[i] for i in order]).tolist()
    assert source.doc_ends.tolist() == np.cumsum([len(DOCS[i]) for i in order]).tolist()
    assert source.loss_mask(0, source.n_tokens).tolist() == np.concatenate([loss[i] for i in order]).tolist()
    theirs = DatatroveFileDataset(str(path), 15, token_size=token_size, return_positions=True)
    batch = rows_of(source, [16 * i for i in range(len(theirs))], 15)
    for number in range(len(theirs)):
        item = theirs[number]
        assert torch.equal(batch.tokens_BT[number], item["input_ids"][:-1])
        assert torch.equal(batch.positions_BT[number], item["positions"][:-1].long())
