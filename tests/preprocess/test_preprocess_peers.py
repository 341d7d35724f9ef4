"""Our files by the readers of datatrove and megatron-core, and their files by ours, documents included."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megastage.data.packed_memmap import PackedMemmapWriter, TokenizerFacts
from megastage.preprocess.__main__ import main
from megastage.preprocess.datasets import open_data

WIDE = 70_000


def make_documents(highest: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [[*rng.integers(1, highest + 1, n).tolist(), 0] for n in rng.integers(1, 40, 50)]


def ours(folder: Path, documents: list[list[int]], dtype: str) -> Path:
    facts = TokenizerFacts("toy", "ab" * 32, WIDE if dtype == "uint32" else 500)
    with PackedMemmapWriter(folder, dtype, eos_id=0, tokenizer=facts) as writer:
        for document in documents:
            writer.append(document)
    return folder


def read(path: Path | str) -> list[list[int]]:
    data = open_data(str(path))
    return [data.document(i).tolist() for i in range(data.n_documents)]


def convert(path: Path | str, output: Path, kind: str) -> Path:
    assert main(["convert", str(path), str(output), "--to", kind]) == 0
    return output


@pytest.fixture
def megatron() -> Any:
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("mmap", [True, False])
def test_megatron_core_reads_ours(tmp_path: Path, megatron: Any, dtype: str, mmap: bool) -> None:
    documents = make_documents(499 if dtype == "uint16" else WIDE - 1)
    convert(ours(tmp_path / "ours", documents, dtype), tmp_path / "m", "megatron")
    theirs = megatron.IndexedDataset(str(tmp_path / "m"), mmap=mmap)
    bounds = theirs.document_indices.tolist()
    got = [[t for s in range(a, b) for t in theirs[s].tolist()] for a, b in pairwise(bounds)]
    assert got == documents


@pytest.mark.parametrize("name", ["uint16", "int32", "int64", "int16", "uint8"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_ours_reads_what_megatron_core_writes(tmp_path: Path, megatron: Any, name: str, sequences: int) -> None:
    import torch

    prefix, documents = str(tmp_path / "theirs"), make_documents({"uint8": 255, "int32": WIDE}.get(name, 30_000))
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.dtype(name).type)
    for document in documents:
        for part in np.array_split(np.array(document), sequences):
            builder.add_item(torch.tensor(part))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    assert read(prefix) == documents
    for kind in ("packed_memmap", "nanoset"):
        assert read(convert(prefix, tmp_path / kind, kind)) == documents
        convert(tmp_path / kind, tmp_path / f"{kind}-back", "megatron")
        if name in ("uint16", "int32") and sequences == 1:
            for suffix in ("bin", "idx"):
                again = (tmp_path / f"{kind}-back.{suffix}").read_bytes()
                assert again == Path(f"{prefix}.{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_datatrove_reads_ours(tmp_path: Path, dtype: str) -> None:
    library = pytest.importorskip("datatrove.utils.dataset")
    documents = make_documents(499 if dtype == "uint16" else WIDE - 1)
    folder = convert(ours(tmp_path / "ours", documents, dtype), tmp_path / "nano", "nanoset")
    flat = [token for document in documents for token in document]
    theirs = library.DatatroveFolderDataset(str(folder), seq_len=16, token_size=2 if dtype == "uint16" else 4)
    assert len(theirs) == len(flat) // 17
    got = [token for i in range(len(theirs)) for token in theirs[i]["input_ids"].tolist()]
    assert got == flat[: len(theirs) * 17]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_ours_reads_what_datatrove_writes(tmp_path: Path, dtype: str) -> None:
    library = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    documents = make_documents(499 if dtype == "uint16" else WIDE - 1)
    theirs = tmp_path / "theirs"
    writer = library.TokenizedFile(
        str(theirs), "00000_x.ds", save_index=True, save_loss_metadata=False, upload_block_size=1 << 20,
        tokenizer_name_or_path=None, save_final_metadata=True, token_size=2 if dtype == "uint16" else 4,
    )  # fmt: skip
    for document in documents:
        writer.write(document, None)
    writer.close()
    writer.write_final_metadata()
    assert read(theirs) == documents
    back = convert(convert(theirs, tmp_path / "packed", "packed_memmap"), tmp_path / "back", "nanoset")
    for suffix in ("", ".index", ".metadata"):
        assert (back / f"tokens.ds{suffix}").read_bytes() == (theirs / f"00000_x.ds{suffix}").read_bytes()
