"""Damaged files: every reader either refuses with a ValueError that names a file, or reads the right tokens."""

import json
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_files import FakeStage, documents, flat, write_megatron, write_nanoset, write_saved_dataset

from megastage.data.engine import DataEngine
from megastage.data.packed_memmap import PackedMemmapWriter
from megastage.data.sources.base import open_source

DOCS = documents(11, 12, low=2, high=12)
KINDS = ["nanoset", "megatron", "packed", "triple", "arrow", "parquet"]
ROWS = [doc[:2] * 4 for doc in DOCS]


def write(folder, kind, docs=DOCS):
    """(dataset_type, path, files that hold the tokens themselves)."""
    if kind == "nanoset":
        write_nanoset(folder, "x", docs, loss=[1] * len(flat(docs)))
        return "nanoset", folder, {"x.ds"}
    if kind == "megatron":
        write_megatron(folder / "x", docs)
        return "megatron", folder, {"x.bin"}
    if kind == "packed":
        with PackedMemmapWriter(folder / "p", "uint16") as writer:
            for doc in docs:
                writer.append(np.array(doc))
        return "packed_memmap", folder / "p", {"tokens.bin"}
    if kind == "triple":
        np.save(folder / "x_token.npy", np.array(flat(docs), np.uint16))
        np.save(folder / "x_mask.npy", np.ones(len(flat(docs)), np.uint8))
        np.save(folder / "x_index.npy", np.cumsum([len(doc) for doc in docs]))
        return "packed_memmap", folder / "x", {"x_token.npy"}
    if kind == "arrow":
        write_saved_dataset(folder, {"input_ids": docs}, shards=1, batch_rows=5)
        return "preprocessed", folder, {"data-00001.arrow"}
    pq.write_table(pa.table({"input_ids": pa.array(docs, pa.list_(pa.int32()))}), folder / "x.parquet")
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
    if how == "zeros":  # a block that was never written
        return content[:at] + bytes(min(1 + value, len(content) - at)) + content[at + 1 + value :]
    if how == "swap":  # two neighbouring blocks
        size = 1 + value % 16
        return content[:at] + content[at + size : at + 2 * size] + content[at : at + size] + content[at + 2 * size :]
    if how == "twice":
        return content[:at] + content[at // 2 :]
    return content[: at // 2] + content[at:]  # a hole


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_never_give_wrong_tokens(tmp_path, kind):
    sound = tmp_path / "sound"
    sound.mkdir()
    dataset_type, path, token_files = write(sound, kind)
    relative = path.relative_to(sound)
    want = flat(DOCS)
    whole = open_source(dataset_type, path)
    assert whole.read(0, whole.n_tokens).tolist() == want
    files = sorted(file.relative_to(sound) for file in sound.rglob("*") if file.is_file())

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        file=st.sampled_from(files),
        how=st.sampled_from(["cut", "grow", "flip", "flip", "flip", "huge", "hole", "zeros", "swap", "twice"]),
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
            read_a_batch(dataset_type, broken / relative)
        except ValueError as error:
            refused = str(error)
        if refused is not None:
            assert str(broken) in refused
        elif file.name not in token_files or how in ("cut", "grow"):
            assert got == want

    check()


def read_a_batch(dataset_type, path):
    """Planned and assembled as in training, from an order over all that the source says of itself."""
    stage = FakeStage(dataset_type=dataset_type, dataset_path=str(path), seq_len=8, global_batch_size=4)
    engine = DataEngine.build([stage], vocab_size=500)
    engine.enter(0, data_rank=0, data_ranks=1)
    batch = engine.next()
    assert batch.cu_seqlens_BC.min() >= 0
    assert batch.cu_seqlens_BC.max() <= 8
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_no_truncated_file_is_taken_for_a_whole_one(tmp_path, kind):
    """Cut behind every single byte: some formats let a file end between two of its blocks."""
    dataset_type, path, _ = write(tmp_path, kind)
    for file in sorted(file for file in tmp_path.rglob("*") if file.is_file()):
        sound = file.read_bytes()
        text = file.suffix in (".metadata", ".json")  # of which the end need not be there
        for size in range(len(sound)):
            file.write_bytes(sound[:size])
            got = read_or_refuse(dataset_type, path)
            assert got is None or (text and got == flat(DOCS)), (file, size)
        file.write_bytes(sound)
    assert read_or_refuse(dataset_type, path) == flat(DOCS)


def read_or_refuse(dataset_type, path):
    """All tokens, or None where a ValueError names a file of the data set; anything else fails."""
    refused = ""
    try:
        source = open_source(dataset_type, path)
        tokens = source.read(0, source.n_tokens).tolist()
        source.document_ends(np.array([0]), np.array([source.n_tokens]))
        return tokens
    except ValueError as error:
        refused = str(error)
    assert str(path.parent) in refused
    return None


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_another_data_set_are_refused_or_read_as_what_they_are(tmp_path, kind):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    dataset_type, path, token_files = write(tmp_path / "one", kind)
    others = documents(12, 17, low=2, high=12)
    write(tmp_path / "two", kind, others)
    for file in sorted(file for file in (tmp_path / "one").rglob("*") if file.is_file()):
        sound = file.read_bytes()
        shutil.copy(tmp_path / "two" / file.relative_to(tmp_path / "one"), file)
        got = read_or_refuse(dataset_type, path)
        # a file that tells where the others end cannot be exchanged; one that holds all that there is, can
        if file.name not in token_files:
            assert got in (None, flat(DOCS)), file
        else:
            assert got in (None, flat(others)), file
        file.write_bytes(sound)
    assert read_or_refuse(dataset_type, path) == flat(DOCS)


@pytest.mark.parametrize("kind", ["nanoset", "megatron", "packed", "triple"])
def test_files_of_a_data_set_that_changed_places_are_refused(tmp_path, kind):
    dataset_type, path, token_files = write(tmp_path, kind)
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    for one, two in ((a, b) for a in files for b in files if a < b):
        contents = one.read_bytes(), two.read_bytes()
        one.write_bytes(contents[1])
        two.write_bytes(contents[0])
        got = read_or_refuse(dataset_type, path)
        # a swap that leaves the tokens and the sizes of everything right changes nothing that can be seen
        assert got is None or (got == flat(DOCS) and not {one.name, two.name} & token_files), (one, two)
        one.write_bytes(contents[0])
        two.write_bytes(contents[1])


@pytest.mark.parametrize(
    ("kind", "name", "at", "value"),
    [
        ("megatron", "x.idx", 18, 2**62),  # sequences
        ("megatron", "x.idx", 26, 2**63 - 1),  # document bounds
        ("megatron", "x.idx", 18, 2**64 - 1),
        ("nanoset", "x.ds.index", 0, 2**64 - 1),
        ("nanoset", "x.ds.index", 8, 2**63),
        ("packed", "p/documents.bin", 0, 2**64 - 1),
        ("arrow", "data-00001.arrow", 4, 2**31 - 1),  # length of the first message
        ("arrow", "data-00001.arrow", 4, 2**63 - 1),
        ("parquet", "x.parquet", -12, 2**63 - 1),  # length of the footer
    ],
)
def test_headers_that_claim_the_impossible_take_no_memory_and_no_time(tmp_path, kind, name, at, value):
    dataset_type, path, _ = write(tmp_path, kind)
    content = bytearray((tmp_path / name).read_bytes())
    at %= len(content)
    content[at : at + 8] = value.to_bytes(8, "little")
    (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    start = time.perf_counter()
    assert read_or_refuse(dataset_type, path) is None
    assert time.perf_counter() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()


def test_metadata_with_huge_numbers_is_refused(tmp_path):
    dataset_type, path, _ = write(tmp_path, "nanoset")
    for text in ("x|2\n" + "9" * 5000, "x|" + "9" * 5000 + "\n1", "x|2\n" + str(2**70)):
        (tmp_path / "x.ds.metadata").write_text(text)
        assert read_or_refuse(dataset_type, path) is None
    (tmp_path / "two").mkdir()
    dataset_type, path, _ = write(tmp_path / "two", "packed")
    metadata = json.loads((path / "metadata.json").read_text())
    for key in ("n_tokens", "n_documents", "page_bytes"):
        for value in (2**70, -1, 1e300, "9" * 40):
            (path / "metadata.json").write_text(json.dumps({**metadata, key: value}))
            assert read_or_refuse(dataset_type, path) is None


_FOOTERS = """
import sys
from pathlib import Path
from megastage.data.sources.base import SourceOptions, open_source
from megastage.preprocess.inputs import find_files, plan_pieces
from megastage.preprocess.readers import BadLine, read_part

def tokens(path):
    source = open_source("preprocessed", path)
    return source.read(0, source.n_tokens).tolist()

def texts(path):
    parts = [part for piece in plan_pieces(find_files([str(path)], text_lines=False), "text") for part in piece.parts]
    found = [item for part in parts for item in read_part(part, "text", lambda _: None)]
    if any(isinstance(item, BadLine) for item in found):
        raise ValueError(str(path))
    return found

refused = 0
for read, name in ((tokens, "tokens"), (texts, "texts")):
    sound = Path(sys.argv[1], name + ".parquet").read_bytes()
    want = read(Path(sys.argv[1], name + ".parquet"))
    footer = int.from_bytes(sound[-8:-4], "little") + 8
    broken = Path(sys.argv[1], "broken.parquet")
    for at in range(len(sound) - footer, len(sound)):
        for value in (sound[at] ^ 1 << at % 8, 0xFF):
            broken.write_bytes(sound[:at] + bytes([value]) + sound[at + 1:])
            try:
                got = read(broken)
            except ValueError as error:
                assert str(broken) in str(error), error
                refused += 1
                continue
            assert got == want, (name, at, value)
print(refused)
"""


def test_no_byte_of_a_parquet_footer_ends_the_process(tmp_path):
    """pyarrow aborts on some; that can be seen from another process only."""
    pq.write_table(pa.table({"input_ids": pa.array(DOCS, pa.list_(pa.int32()))}), tmp_path / "tokens.parquet")
    pq.write_table(pa.table({"text": ["one two", "three", "four"]}), tmp_path / "texts.parquet")
    command = [sys.executable, "-c", _FOOTERS, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 300
