import gzip
import json
import os
import subprocess
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import write_saved_dataset

from megastage.data.packed_memmap import verify
from megastage.data.sources import cache as build_cache
from megastage.data.sources import sample_text, text
from megastage.data.sources.base import SourceError, SourceOptions, open_source

TEXTS = ["A first text.", "Zweiter Text: äöü €.", "third", "", "the\nlast one"]


class WordTokenizer:
    """A tokenizer written for the test: one id per word, in the order of first sight."""

    name, vocab_size, eos_id, sha256 = "words", 1000, 0, "cd" * 32

    def __init__(self):
        self.ids, self.calls = {}, 0

    def encode_batch(self, texts):
        self.calls += 1
        return [np.array([self.ids.setdefault(w, len(self.ids) + 1) for w in t.split()], np.int64) for t in texts]


def tokens_of(texts, tokenizer):
    return [i for t in texts for i in [*(tokenizer.ids[w] for w in t.split()), 0]]


def write(folder, kind):
    folder.mkdir()
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS)
    if kind in ("jsonl", "json"):
        (folder / f"x.{kind}").write_text(lines)
    elif kind == "array":
        (folder / "x.json").write_text(json.dumps([{"text": t} for t in TEXTS]))
    elif kind == "gz":
        with gzip.open(folder / "x.jsonl.gz", "wt") as file:
            file.write(lines)
    elif kind == "zst":
        zstandard = pytest.importorskip("zstandard")
        (folder / "x.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    elif kind == "txt":
        for number, t in enumerate(TEXTS):
            (folder / f"{number}.txt").write_text(t)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), folder / "x.parquet")
    elif kind == "saved":
        write_saved_dataset(folder / "saved", {"text": TEXTS}, types={"text": pa.string()}, batch_rows=2)
        return folder / "saved"
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "json", "array", "gz", "zst", "txt", "parquet", "saved"])
def test_text_files(tmp_path, kind):
    tokenizer = WordTokenizer()
    options = SourceOptions(tokenizer=tokenizer, cache_folder=tmp_path / "cache")
    source = open_source("huggingface", write(tmp_path / "in", kind), options)
    assert source.read(0, source.n_tokens).tolist() == tokens_of(TEXTS, tokenizer)
    assert source.n_documents == len(TEXTS)
    assert (source.vocab_size, source.eos_id, source.tokenizer_hash) == (1000, 0, "cd" * 32)


def test_the_cache_is_used_and_follows_the_text(tmp_path):
    tokenizer = WordTokenizer()
    options = SourceOptions(tokenizer=tokenizer, cache_folder=tmp_path / "cache")
    folder = write(tmp_path / "in", "jsonl")
    first = open_source("huggingface", folder, options)
    calls = tokenizer.calls
    again = open_source(
        "huggingface", folder, SourceOptions(tokenizer=tokenizer, cache_folder=tmp_path / "cache", may_build=False)
    )
    assert tokenizer.calls == calls
    assert again.fingerprint == first.fingerprint
    cached = list((tmp_path / "cache").iterdir())
    assert len(cached) == 1
    verify(cached[0])
    with open(folder / "x.jsonl", "a") as file:
        file.write('{"text": "third third"}\n')
    longer = open_source("huggingface", folder, options)
    assert longer.n_tokens == first.n_tokens + 3
    assert longer.fingerprint != first.fingerprint


def test_the_same_size_and_time_with_another_text_is_noticed(tmp_path):
    options = SourceOptions(tokenizer=WordTokenizer(), cache_folder=tmp_path / "cache")
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one two"}\n')
    times = os.stat(file).st_mtime_ns
    first = open_source("huggingface", file, options)
    file.write_text('{"text": "two one"}\n')
    os.utime(file, ns=(times, times))
    assert open_source("huggingface", file, options).fingerprint != first.fingerprint


@pytest.mark.parametrize("whole_bytes", [1 << 30, 1000])
def test_an_edit_far_inside_a_file_is_noticed_and_a_copy_is_not_an_edit(tmp_path, monkeypatch, whole_bytes):
    monkeypatch.setattr(text, "_WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(text, "_PAGE_BYTES", 16)
    file, copy = tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt"
    file.parent.mkdir()
    copy.parent.mkdir()
    file.write_bytes(b"word " * 40_000)
    before, times = text.content_key([file]), os.stat(file).st_mtime_ns
    assert text.content_key([file]) == before
    copy.write_bytes(file.read_bytes())
    assert (text.content_key([copy]) == before) == (whole_bytes > 200_000)
    with open(file, "r+b") as opened:
        opened.seek(123_457)
        opened.write(b"Z")
    os.utime(file, ns=(times, times))
    assert text.content_key([file]) != before


def test_what_killed_builds_left_is_removed_and_what_others_build_is_not(tmp_path):
    cache = tmp_path / "cache"
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = build_cache._host()
    names = {
        f"..text-aa-{here}-{ended.pid}-12345678.partial": False,
        f".text-aa-{here}-{os.getpid()}-12345678": True,
        ".text-aa-elsewhere-1-12345678": True,
        "..text-aa-elsewhere-2-12345678.partial": False,
        "text-aa": True,
        "other": True,
    }
    for name in names:
        (cache / name).mkdir(parents=True)
        (cache / name / "tokens.bin").write_bytes(b"1")
    old = time.time() - 2 * build_cache._ABANDONED_S
    for path in (cache / "..text-aa-elsewhere-2-12345678.partial").rglob("*"):
        os.utime(path, (old, old))
    os.utime(cache / "..text-aa-elsewhere-2-12345678.partial", (old, old))
    options = SourceOptions(tokenizer=WordTokenizer(), cache_folder=cache)
    open_source("huggingface", write(tmp_path / "in", "jsonl"), options)
    assert {name: (cache / name).exists() for name in names} == names


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    class Breaks(WordTokenizer):
        def encode_batch(self, texts):
            raise RuntimeError("no")

    options = SourceOptions(tokenizer=Breaks(), cache_folder=tmp_path / "cache")
    with pytest.raises(RuntimeError):
        open_source("huggingface", write(tmp_path / "in", "jsonl"), options)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": 3}\n', "x.jsonl, line 2: no text under 'text'"),
        ("x.jsonl", b'{"body": "a"}\n', "line 1: no text under 'text' (found ['body'])"),
        ("x.jsonl", b'{"text": "a"\n', "x.jsonl, line 1: no JSON"),
        ("x.jsonl", b'{"text": "\xff"}\n', "line 1: not UTF-8"),
        ("x.jsonl.gz", b"not gzip", "x.jsonl.gz: damaged gzip data"),
        ("x.json", b"[1, 2", "x.json: no JSON"),
        ("x.jsonl", b"", "its text gives no tokens"),
        ("x.parquet", b"PAR1", "x.parquet: not readable as .parquet"),
        ("x.docx", b"?", "not a known kind of text file"),
    ],
)
def test_bad_text_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    options = SourceOptions(tokenizer=WordTokenizer(), cache_folder=tmp_path / "cache")
    with pytest.raises(SourceError) as error:
        open_source("huggingface", tmp_path / name, options)
    assert words in str(error.value)


def test_text_without_a_tokenizer_or_a_path(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(SourceError, match=r"text needs a tokenizer; set model.hf_assets_path"):
        open_source("huggingface", tmp_path / "x.txt", SourceOptions(cache_folder=tmp_path))
    options = SourceOptions(tokenizer=WordTokenizer(), cache_folder=tmp_path / "cache")
    with pytest.raises(SourceError, match="no such file or folder"):
        open_source("huggingface", "/nowhere/x", options)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(SourceError, match=r"names on the hub need `pip install megastage\[datasets\]`"):
        open_source("huggingface", "c4", options)
    monkeypatch.setattr(sample_text, "SPLITS", sample_text.SPLITS)
    with pytest.raises(SourceError, match="the first rank of this node writes it"):
        open_source("huggingface", "c4_test", SourceOptions(cache_folder=tmp_path / "none", may_build=False))


def test_the_default_text_needs_nothing_and_never_changes(tmp_path):
    source = open_source("huggingface", "c4_test", SourceOptions(cache_folder=tmp_path))
    assert (source.vocab_size, source.eos_id) == (257, 256)
    assert source.n_documents == 3000
    assert source.n_tokens > 2_000_000
    first = bytes(source.read(0, int(source.doc_ends[0]) - 1).astype(np.uint8)).decode()
    assert first == next(iter(sample_text.documents("c4_test")))
    validation = open_source("huggingface", "c4_validation", SourceOptions(cache_folder=tmp_path))
    assert validation.fingerprint != source.fingerprint
    # golden: the same text on every machine, so that runs can be compared
    assert source.fingerprint.hex()[:16] == "f5e09d30c5f9198a"


def test_folders_are_read_in_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(text.documents(text.text_files(tmp_path), "text")) == ["a.txt", "b.txt", "sub/c.txt"]
