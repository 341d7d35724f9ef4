"""One rule for positions, labels and document bounds, whatever the format that the same documents are kept in."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from source_files import documents, ends, flat, write_megatron, write_nanoset, write_saved_dataset

from megastage.data.packed_memmap import PackedMemmapWriter
from megastage.data.sources.base import SourceOptions, open_source
from megastage.validation import count_rows, read_rows

DOCS = documents(8, 60, low=1, high=40, eos=500)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """DOCS in every format, by its name."""
    root = tmp_path_factory.mktemp("formats")
    write_nanoset(root / "nanoset", "x", DOCS)
    write_nanoset(root / "no index", "x", DOCS, index=False)
    (root / "megatron").mkdir()
    write_megatron(root / "megatron" / "x", DOCS, code=4)
    with PackedMemmapWriter(root / "packed", "uint32", eos_id=500) as writer:
        writer.extend(np.array(flat(DOCS)), [len(doc) for doc in DOCS])
    (root / "triple").mkdir()
    np.save(root / "triple" / "x_token.npy", np.array(flat(DOCS), np.int64))
    np.save(root / "triple" / "x_index.npy", ends(DOCS))
    write_saved_dataset(root / "arrow", {"input_ids": DOCS})
    (root / "parquet").mkdir()
    pq.write_table(pa.table({"input_ids": pa.array(DOCS, pa.list_(pa.uint16()))}), root / "parquet" / "x.parquet")
    kinds = {"no index": "nanoset", "packed": "packed_memmap", "triple": "packed_memmap"}
    kinds |= dict.fromkeys(("arrow", "parquet"), "preprocessed")
    options = SourceOptions(eos_id=500)
    return {folder.name: open_source(kinds.get(folder.name, folder.name), folder, options) for folder in root.iterdir()}


@pytest.mark.parametrize("seq_len", [1, 16, 37, 5000])
@pytest.mark.parametrize("mask", [True, False])
def test_the_same_rows_from_every_format(sources, seq_len, mask):
    assert len(sources) == 7
    batches = {
        name: read_rows(source, 0, count_rows(source, seq_len), seq_len, document_mask=mask, vocab_size=501)
        for name, source in sources.items()
    }
    want = batches.pop("nanoset")
    last = want.cu_seqlens_BC[:, -1].long() - 1
    rows = torch.arange(len(last))
    for name, batch in batches.items():
        for field in ("tokens_BT", "positions_BT", "cu_seqlens_BC"):
            assert torch.equal(getattr(batch, field), getattr(want, field)), (name, field)
        if not mask and sources[name].kind == "documents":
            # documents that are packed in any order have no next one where a row ends with them
            ended = want.tokens_BT[rows, last] == 500
            assert (batch.labels_BT[rows[ended], last[ended]] == -100).all()
            batch.labels_BT[rows[ended], last[ended]] = want.labels_BT[rows[ended], last[ended]]
        assert torch.equal(batch.labels_BT, want.labels_BT), name
