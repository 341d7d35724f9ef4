"""Damaged files: every reader either refuses with a ValueError that names a file, or reads the right tokens."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_files import documents, flat, write_megatron, write_nanoset, write_saved_dataset

from megastage.data.packed_memmap import PackedMemmapWriter
from megastage.data.sources.base import open_source

DOCS = documents(11, 12, low=2, high=12)
ROWS = [doc[:2] * 4 for doc in DOCS]


def write(folder, kind):
    """(dataset_type, path, files that hold the tokens themselves)."""
    if kind == "nanoset":
        write_nanoset(folder, "x", DOCS, loss=[1] * len(flat(DOCS)))
        return "nanoset", folder, {"x.ds"}
    if kind == "megatron":
        write_megatron(folder / "x", DOCS)
        return "megatron", folder, {"x.bin"}
    if kind == "packed":
        with PackedMemmapWriter(folder / "p", "uint16") as writer:
            for doc in DOCS:
                writer.append(np.array(doc))
        return "packed_memmap", folder / "p", {"tokens.bin"}
    if kind == "triple":
        np.save(folder / "x_token.npy", np.array(flat(DOCS), np.uint16))
        np.save(folder / "x_mask.npy", np.ones(len(flat(DOCS)), np.uint8))
        np.save(folder / "x_index.npy", np.cumsum([len(doc) for doc in DOCS]))
        return "packed_memmap", folder / "x", {"x_token.npy"}
    if kind == "arrow":
        write_saved_dataset(folder, {"input_ids": DOCS}, shards=1)
        return "preprocessed", folder, {"data-00001.arrow"}
    pq.write_table(pa.table({"input_ids": pa.array(DOCS, pa.list_(pa.int32()))}), folder / "x.parquet")
    return "preprocessed", folder, {"x.parquet"}


def damage(content, how, where, value):
    """The content with one kind of damage; `where` in [0, 1)."""
    at = int(where * len(content))
    if how == "cut":
        return content[:at]
    if how == "grow":
        return content + bytes([value]) * (1 + at % 9)
    if how == "flip":
        return content[:at] + bytes([content[at] ^ (1 << value % 8)]) + content[at + 1 :]
    if how == "huge":  # eight bytes of a very large number, as a lying header has
        return content[:at] + b"\xff" * 7 + b"\x7f" + content[at + 8 :]
    return content[: at // 2] + content[at:]  # a hole


@pytest.mark.parametrize("kind", ["nanoset", "megatron", "packed", "triple", "arrow", "parquet"])
def test_damaged_files_never_give_wrong_tokens(tmp_path, kind):
    sound = tmp_path / "sound"
    sound.mkdir()
    dataset_type, path, token_files = write(sound, kind)
    relative = path.relative_to(sound)
    want = flat(DOCS)
    whole = open_source(dataset_type, path)
    assert whole.read(0, whole.n_tokens).tolist() == want
    files = sorted(file.relative_to(sound) for file in sound.rglob("*") if file.is_file())

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        file=st.sampled_from(files),
        how=st.sampled_from(["cut", "grow", "flip", "flip", "huge", "hole"]),
        where=st.floats(0, 1, exclude_max=True),
        value=st.integers(0, 255),
    )
    def check(file, how, where, value):
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(sound, broken)
        content, refused = (broken / file).read_bytes(), None
        (broken / file).write_bytes(damage(content, how, where, value))
        try:
            source = open_source(dataset_type, broken / relative)
            got = source.read(0, source.n_tokens).tolist()
            offsets, ends = source.document_ends(np.array([0]), np.array([source.n_tokens]))
            assert offsets.tolist() == [0, len(ends)]
            assert ((ends > 0) & (ends <= source.n_tokens)).all()
            assert len(source.fingerprint) == 32
        except ValueError as error:
            refused = str(error)
        if refused is not None:
            assert str(broken) in refused
        elif file.name not in token_files or how == "cut":
            assert got == want

    check()
