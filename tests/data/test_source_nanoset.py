import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from source_files import documents, ends, flat, write_nanoset

from megastage.data.sources.base import SourceError, SourceOptions, open_source


def test_folder_is_one_stream_in_sorted_order(tmp_path):
    a, b, c = documents(1, 30), documents(2, 3), documents(3, 20)
    for name, docs in (("z", c), ("10", a), ("2", b)):
        write_nanoset(tmp_path, name, docs)
    (tmp_path / "merged.ds.metadata").write_text("gpt2|4\n99\n")  # an orphan, as merging leaves it
    source = open_source("nanoset", tmp_path)
    want = flat(a + b + c)
    assert source.n_tokens == len(want)
    assert source.kind == "stream"
    assert source.dtype == np.uint16
    assert source.read(0, len(want)).tolist() == want
    rng = np.random.default_rng(0)
    for start, stop in np.sort(rng.integers(0, len(want) + 1, (300, 2)), axis=1).tolist():
        assert source.read(start, stop).tolist() == want[start:stop]
    assert source.doc_ends.tolist() == ends(a + b + c).tolist()
    assert source.n_documents == 53


def test_a_single_file_and_four_byte_tokens(tmp_path):
    docs = documents(5, 9, vocab=100_000)
    write_nanoset(tmp_path, "x", docs, size=4)
    source = open_source("nanoset", tmp_path / "x.ds")
    assert source.read(0, source.n_tokens).tolist() == flat(docs)
    assert type(source.read(0, 5)) is np.ndarray


def test_document_ends_in_ranges_across_files(tmp_path):
    files = [documents(seed, 12, high=9) for seed in range(5)]
    for number, docs in enumerate(files):
        write_nanoset(tmp_path, f"f{number}", docs)
    source = open_source("nanoset", tmp_path)
    every = ends([doc for docs in files for doc in docs]).tolist()
    rng = np.random.default_rng(1)
    ranges = np.sort(rng.integers(0, source.n_tokens, (200, 2)), axis=1)
    ranges = ranges[ranges[:, 0] < ranges[:, 1]]
    offsets, found = source.document_ends(ranges[:, 0], ranges[:, 1])
    for i, (start, stop) in enumerate(ranges.tolist()):
        assert found[offsets[i] : offsets[i + 1]].tolist() == [e for e in every if start < e <= stop]


@pytest.mark.parametrize("eos", [None, 7])
def test_without_index_documents_end_at_eos_or_at_files(tmp_path, eos):
    a, b = documents(1, 5, eos=7), documents(2, 5, eos=7)
    a, b = ([[t if t != 7 or i == len(d) - 1 else 8 for i, t in enumerate(d)] for d in docs] for docs in (a, b))
    b[-1].pop()  # the second file ends without EOS
    write_nanoset(tmp_path, "a", a, index=False)
    write_nanoset(tmp_path, "b", b, index=False)
    source = open_source("nanoset", tmp_path, SourceOptions(eos_id=eos))
    want = ends(a + b) if eos is not None else np.array([len(flat(a)), len(flat(a + b))])
    _, found = source.document_ends(np.array([0]), np.array([source.n_tokens]))
    assert found.tolist() == want.tolist()
    assert source.n_documents is None


def test_loss_file_masks_tokens(tmp_path):
    a, b = documents(1, 4), documents(2, 4)
    mask = np.random.default_rng(0).integers(0, 2, len(flat(a)))
    write_nanoset(tmp_path, "a", a, loss=mask.tolist())
    write_nanoset(tmp_path, "b", b)
    source = open_source("nanoset", tmp_path)
    got = source.loss_mask(0, source.n_tokens)
    assert got.dtype == bool
    assert got.tolist() == [bool(m) for m in mask] + [True] * len(flat(b))


def test_fingerprint_is_of_the_content_alone(tmp_path):
    docs = documents(1, 40)
    one = open_source("nanoset", write_nanoset(tmp_path / "one", "a", docs))
    copy = open_source("nanoset", write_nanoset(tmp_path / "two", "other", docs))
    split = write_nanoset(tmp_path / "three", "a", docs[:11])
    split = open_source("nanoset", write_nanoset(split, "b", docs[11:]))
    assert one.fingerprint == copy.fingerprint == split.fingerprint
    assert len(one.fingerprint) == 32
    changed = [list(doc) for doc in docs]
    changed[3][0] += 1
    moved = [docs[0][:-1], docs[0][-1:] + docs[1], *docs[2:]] if len(docs[0]) > 1 else [docs[0] + docs[1], *docs[2:]]
    for number, other in enumerate((changed, moved, docs[:-1])):
        different = open_source("nanoset", write_nanoset(tmp_path / f"d{number}", "a", other))
        assert different.fingerprint != one.fingerprint
    wide = open_source("nanoset", write_nanoset(tmp_path / "wide", "a", docs, size=4))
    assert wide.fingerprint != one.fingerprint


def _spoil(folder, what):
    ds, index, meta = folder / "a.ds", folder / "a.ds.index", folder / "a.ds.metadata"
    if what == "no metadata":
        meta.unlink()
    elif what == "odd size":
        ds.write_bytes(ds.read_bytes()[:-1])
    elif what == "truncated":
        ds.write_bytes(ds.read_bytes()[:-2])
    elif what == "empty":
        ds.write_bytes(b"")
    elif what == "size 3":
        meta.write_text("gpt2|3\n")
    elif what == "no bar":
        meta.write_text("gpt2")
    elif what == "binary metadata":
        meta.write_bytes(b"\xff\xfe|2\n")
    elif what == "bad count":
        meta.write_text("gpt2|2\nmany\n")
    elif what == "size lies":
        meta.write_text("gpt2|4\n" + meta.read_text().split("\n")[1])
    elif what == "index descends":
        values = np.fromfile(index, "<u8")
        values[2], values[3] = values[3], values[2]
        values.tofile(index)
    elif what == "index beyond":
        values = np.fromfile(index, "<u8")
        values[-1] += 5
        values.tofile(index)
    elif what == "index odd":
        index.write_bytes(index.read_bytes()[:-3])
    elif what == "index empty":
        index.write_bytes(b"")
    elif what == "loss short":
        (folder / "a.ds.loss").write_bytes(b"\1\0")
    elif what == "two tokenizers":
        write_nanoset(folder, "b", [[1, 2]], tokenizer="llama")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no metadata", "a.ds.metadata: missing"),
        ("odd size", "a.ds: 399 bytes are no whole number"),
        ("truncated", "holds 199 tokens of 2 bytes, but a.ds.metadata records 200"),
        ("empty", "a.ds: empty"),
        ("size 3", "'gpt2|3' is not `tokenizer|token_size`"),
        ("no bar", "'gpt2' is not"),
        ("binary metadata", "a.ds.metadata: no text"),
        ("bad count", "'many' is no token count"),
        ("size lies", "holds 100 tokens of 4 bytes, but a.ds.metadata records 200"),
        ("index descends", "a.ds.index: document end 3 is 30, smaller than the one in front"),
        ("index beyond", "the last document end is 205, but there are 200 tokens"),
        ("index odd", "a.ds.index: 157 bytes are no whole number"),
        ("index empty", "a.ds.index: empty"),
        ("loss short", "a.ds.loss: 2 bytes, but a.ds holds 200 tokens"),
        ("two tokenizers", "different tokenizers (gpt2, llama)"),
    ],
)
def test_bad_files_are_named(tmp_path, what, words):
    write_nanoset(tmp_path, "a", [[number] * 10 for number in range(20)])
    _spoil(tmp_path, what)
    with pytest.raises(SourceError) as error:
        open_source("nanoset", tmp_path)
    assert words in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(("name", "words"), [("missing", "no such file or folder"), ("", "holds no nanoset file")])
def test_missing_and_empty_folders(tmp_path, name, words):
    with pytest.raises(SourceError, match=words):
        open_source("nanoset", tmp_path / name)


def test_a_file_whose_link_leads_nowhere_is_not_left_out(tmp_path):
    write_nanoset(tmp_path, "a", [[1, 2, 3]])
    (tmp_path / "b.ds").symlink_to(tmp_path / "unmounted" / "b.ds")
    with pytest.raises(SourceError, match=r"b\.ds: a link to .*unmounted/b\.ds, which is not there"):
        open_source("nanoset", tmp_path)


def test_more_files_than_a_process_may_open(tmp_path):
    for number in range(150):
        write_nanoset(tmp_path, f"{number:03}", [[1 + number, 2]])
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64));"
        "from megastage.data.sources.base import open_source;"
        "source = open_source('nanoset', sys.argv[1]); print(source.read(0, source.n_tokens)[::2].tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.stdout == f"{list(range(1, 151))}\n", done.stderr


def test_unknown_type():
    with pytest.raises(SourceError, match="'nanosets' is not known; choose one of huggingface, megatron"):
        open_source("nanosets", "/data")
