"""Text tokenized while it is read: shared by processes, kept in a cache that may be damaged, from wherever it comes."""

from __future__ import annotations

import json
import multiprocessing
import sys
import tracemalloc
import types

import numpy as np
import pyarrow as pa
import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_texts import Bytes, make_texts, write_texts
from source_files import FakeStage
from test_data_index import attempt, on_ranks
from test_source_live import opened, rows_from

from megastage.data.engine import DataEngine
from megastage.data.index import order_of
from megastage.data.sources import chunks
from megastage.data.sources.base import SourceError, SourceOptions, open_source
from megastage.data.sources.live import LiveText
from megastage.data.tokenizer import train_bpe


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "MIN_CHARACTERS", 4000)
    monkeypatch.setattr(chunks, "MAX_CHARACTERS", 4000)
    monkeypatch.setattr("os.fsync", lambda handle: None)


def _read(path, folder, queue):
    tokenizer = Bytes()
    rows, _ = rows_from(path, folder, tokenizer=tokenizer, stop=1200)
    queue.put((tokenizer.characters, sum(map(sum, rows))))


def test_processes_of_a_node_tokenize_the_text_once_together(tmp_path):
    texts = make_texts(300, seed=6)
    path = write_texts(tmp_path / "in", "mixed", texts)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_read, args=(path, tmp_path, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    characters, sums = zip(*(queue.get(timeout=100) for _ in processes))
    for process in processes:
        process.join()
    assert len(set(sums)) == 1
    assert sum(characters) <= sum(map(len, texts))
    assert sum(characters) > 0.9 * sum(map(len, texts))


def test_every_rank_proves_the_text_and_reads_the_same_order(tmp_path):
    for rank in range(4):
        (tmp_path / f"rank{rank}").mkdir()
        write_texts(tmp_path / f"rank{rank}" / "text", "mixed", make_texts(150, seed=7))
    stage = FakeStage(dataset_type="huggingface", dataset_path="text")

    def work(rank):
        cache = tmp_path / f"rank{rank}" / "cache"
        return attempt([stage], rank, options=SourceOptions(tokenizer=Bytes(), cache_folder=cache, live_bytes=0))

    results = on_ranks(tmp_path, work)
    assert not any(isinstance(result, BaseException | str) for result in results), results
    assert len({state for _, state in results}) == 1
    for steps in zip(*(out for out, _ in results)):
        assert len({digest for _, digest, _ in steps}) == 1
        assert sorted(i for ids, _, _ in steps for i in ids) == list(range(min(steps[0][0]), min(steps[0][0]) + 8))
    with open(tmp_path / "rank2" / "text" / "part-000.jsonl", "r+b") as file:
        file.seek(30)
        file.write(b"Z")
    found = on_ranks(tmp_path, work)
    assert len(set(found)) == 1
    assert "rank 2: text: its content differs from rank 0's" in found[0]


@pytest.mark.parametrize("damage", ["flip", "cut", "facts", "gone", "swap"])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    path = write_texts(tmp_path / "in", "jsonl", make_texts(200, seed=8))
    expected, _ = rows_from(path, tmp_path, stop=600)
    made = sorted((tmp_path / "cache").glob("live-*/chunk-*"))
    assert len(made) > 8
    for number, folder in enumerate(made[1:7]):
        tokens = folder / "packed" / "tokens.bin"
        if damage == "flip":
            content = bytearray(tokens.read_bytes())
            content[number * 7] ^= 4
            tokens.write_bytes(content)
        elif damage == "cut":
            tokens.write_bytes(tokens.read_bytes()[:-3])
        elif damage == "facts":
            facts = folder / "chunk.json"
            facts.write_bytes(facts.read_bytes().replace(b'"start": [', b'"start": [1'))
        elif damage == "gone":
            (folder / "chunk.json").unlink()
        elif number % 2 == 0:
            tokens.write_bytes((made[number + 2] / "packed" / "tokens.bin").read_bytes())
    assert rows_from(path, tmp_path, stop=600)[0] == expected


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["jsonl", "gz", "zst", "array", "txt", "parquet", "arrow", "saved"]))
def test_damaged_text_is_the_error_that_it_is_for_text_tokenized_before(tmp_path_factory, data, kind):
    root = tmp_path_factory.mktemp("fuzz")
    path = write_texts(root / "in", kind, make_texts(40, seed=10, mean=100), files=2)
    file = data.draw(st.sampled_from(sorted(f for f in path.iterdir() if f.suffix != ".state")))
    content = bytearray(file.read_bytes())
    if not content:
        return
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    cached, problem = None, ""
    try:
        cached = opened(path, root, live=False)
    except SourceError as error:
        problem = str(error)
    if cached is None:
        assert str(path) in problem
        with pytest.raises(SourceError) as found:
            opened(path, root).reach(None)
        assert str(path) in str(found.value)
        return
    live = opened(path, root)
    assert live.reach(None) == cached.n_tokens
    rows = [order_of(source, 0, [50], None).enter([], 50).rows(np.arange(400)) for source in (cached, live)]
    assert all(np.array_equal(a, b) for a, b in zip(*rows))
    for start, length in zip(rows[0].starts.tolist(), rows[0].lengths.tolist()):
        assert np.array_equal(cached.read(start, start + length), live.read(start, start + length))


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    for name in ("MIN_CHARACTERS", "MAX_CHARACTERS"):
        monkeypatch.setattr(chunks, name, 100_000)
    peaks = []
    for count, rows in ((1500, 600), (9000, 3600)):
        path = write_texts(tmp_path / f"in{count}", "mixed", make_texts(count, seed=11), files=9)
        source = opened(path, tmp_path)
        cursor = order_of(source, 0, [2000], None).enter([], 2000)
        tracemalloc.start()
        for first in range(0, rows, 50):
            cursor.rows(np.arange(first, first + 50))
            cursor.mark(first + 50)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert source.reach(None) < rows * 2000  # all of it was read
        source.close()
    assert peaks[1] < 1.5 * peaks[0] + 1_000_000


def test_text_behind_a_url(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    local = write_texts(tmp_path / "in", "jsonl", make_texts(200, seed=12))
    lines = (local / "part-002.jsonl").read_bytes().split(b"\n")
    lines[-3] = b"{"
    (local / "part-002.jsonl").write_bytes(b"\n".join(lines))
    for file in local.iterdir():
        fs.pipe(f"/bucket/in/{file.name}", file.read_bytes())
    options = SourceOptions(tokenizer=Bytes(), cache_folder=tmp_path / "cache", live_bytes=0)
    source = open_source("huggingface", "memory://bucket/in", options)
    assert isinstance(source, LiveText)
    assert source.path == "memory://bucket/in"
    with pytest.raises(SourceError, match=rf"memory://bucket/in/part-002\.jsonl, line {len(lines) - 2}: no JSON"):
        source.reach(None)
    fs.store.clear()


def test_a_data_set_of_the_hub_is_read_from_the_files_that_hold_it(tmp_path, monkeypatch):
    texts = make_texts(120, seed=13)
    path = write_texts(tmp_path / "in", "arrow", texts)
    rows = types.SimpleNamespace(
        column_names=["text"], _fingerprint="f", _indices=None,
        cache_files=[{"filename": str(file)} for file in sorted(path.iterdir())],
    )  # fmt: skip
    fake = types.SimpleNamespace(load_dataset=lambda *names, split: rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    options = SourceOptions(tokenizer=Bytes(), cache_folder=tmp_path / "cache", live_bytes=0)
    source = open_source("huggingface", "someone/some-text", options)
    assert isinstance(source, LiveText)
    assert source.reach(None) == sum(len(text.encode()) + 1 for text in texts)


def test_rows_that_are_no_text_are_named(tmp_path):
    for content, words in (
        ([json.dumps({"text": "a" * 5000}), '{"text": "\\ud800"}'], "line 2: 'text' is no Unicode text"),
        ([json.dumps({"text": "a" * 5000})] * 70 + ["", '{"body": 1}'], "line 72: no text under 'text'"),
        ([json.dumps({"text": "a" * 5000})] * 70 + ["[1]"], "line 71: no text under 'text' .found list"),
    ):
        file = tmp_path / "x.jsonl"
        file.write_text("\n".join(content))
        with pytest.raises(SourceError, match=words):
            opened(file, tmp_path).reach(None)
    table = pa.table({"text": ["a" * 100] * 90 + [None]})
    with pa.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=8)
    with pytest.raises(SourceError, match=r"x\.arrow: column 'text' holds NoneType in row 90"):
        opened(tmp_path / "x.arrow", tmp_path).reach(None)


def test_ranks_of_one_process_group_share_a_cache(tmp_path):
    write_texts(tmp_path / "text", "jsonl", make_texts(200, seed=14))
    stage = FakeStage(dataset_type="huggingface", dataset_path=str(tmp_path / "text"))

    def work(rank):
        tokenizer = Bytes()
        options = SourceOptions(tokenizer=tokenizer, cache_folder=tmp_path / "cache", live_bytes=0)
        engine = DataEngine.build([stage], group=dist.group.WORLD, options=options, node_leader=rank == 0)
        engine.enter(0, data_rank=rank, data_ranks=4)
        for _ in range(300):
            engine.next()
        digest, characters = engine.sample_digest(), tokenizer.characters
        engine.close()
        return digest, characters

    digests, characters = zip(*on_ranks(tmp_path, work))
    assert len(set(digests)) == 1
    assert sum(characters) <= sum(map(len, make_texts(200, seed=14)))


def test_a_long_document_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    texts = [
        "\n".join(f"line {i} of the long text, {i * i % 97} lines before {i % 13}" for i in range(900)),
        "short",
    ] * 70
    tokenizer = train_bpe(texts, 400, tmp_path / "tokenizer.json")
    path = write_texts(tmp_path / "in", "jsonl", texts)
    whole = opened(path, tmp_path / "whole", live=False, tokenizer=tokenizer)
    monkeypatch.setattr("megastage.data.long_text.LONG_CHARACTERS", 3000)
    longest = []
    encode_batch = tokenizer.encode_batch
    monkeypatch.setattr(
        tokenizer, "encode_batch", lambda given: [longest.append(max(map(len, given))), encode_batch(given)][1]
    )
    live = opened(path, tmp_path, tokenizer=tokenizer)
    assert live.reach(None) == whole.n_tokens
    for start in range(0, whole.n_tokens, 1000):
        stop = min(live.readable_to(start), start + 1000)
        assert np.array_equal(live.read(start, stop), whole.read(start, stop))
    assert max(longest) <= 6000 < len(texts[0])
