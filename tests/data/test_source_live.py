"""Text tokenized while it is read, against the same text tokenized before."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from live_texts import KINDS, Bytes, make_texts, write_texts

from megastage.data.index import order_of
from megastage.data.order import Visit
from megastage.data.sources import chunks
from megastage.data.sources.base import SourceOptions, open_source
from megastage.data.sources.live import LiveText
from megastage.validation import count_rows, read_rows


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of a few documents, of which few are kept open; what a disk takes to sync is not waited for."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
    monkeypatch.setattr(chunks, "MIN_CHARACTERS", 4000)
    monkeypatch.setattr(chunks, "MAX_CHARACTERS", 4000)
    monkeypatch.setattr("megastage.data.sources.live._OPEN_CHUNKS", 5)


def opened(path, folder, *, live=True, tokenizer=None):
    """The text, tokenized as it is read or (not live) before."""
    options = SourceOptions(
        tokenizer=tokenizer or Bytes(), cache_folder=folder / "cache", live_bytes=0 if live else None
    )
    source = open_source("huggingface", path, options)
    assert isinstance(source, LiveText) == live
    return source


def tokens_of(source, rows):
    """The tokens of each row."""
    pieces = [source.read(s, s + n).tolist() for s, n in zip(rows.starts.tolist(), rows.lengths.tolist())]
    return [list(itertools.chain(*pieces[a:b])) for a, b in zip(rows.offsets[:-1].tolist(), rows.offsets[1:].tolist())]


def same_rows(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize(("kind", "eos_id"), [*((kind, 299) for kind in KINDS), ("jsonl", None), ("txt", None)])
def test_rows_are_those_of_text_that_was_tokenized_before(tmp_path, kind, eos_id):
    texts = make_texts(90, mean=150)
    path = write_texts(tmp_path / "in", kind, texts)
    cached, live = (opened(path, tmp_path, live=live, tokenizer=Bytes(eos_id)) for live in (False, True))
    before, now = (order_of(source, 0, [64], None) for source in (cached, live))
    assert (now.streams, live.streams) == (before.streams, before.streams)
    history = []
    for seq_len, count in ((64, 120), (17, 201), (500, 60), (64, 400)):  # some two epochs
        cursors = [order.enter(history, seq_len) for order in (before, now)]
        done = 0
        while done < count:
            counters = np.arange(done, min(done + 61, count))
            expected, found = (cursor.rows(counters) for cursor in cursors)
            assert same_rows(expected, found)
            assert tokens_of(cached, expected) == tokens_of(live, found)
            done += len(counters)
        history.append(Visit(seq_len, count, cursors[1].mark(count)))
    assert live.reach(None) == cached.n_tokens


def rows_from(path, folder, *, tokenizer=None, mark=None, history=(), seq_len=50, start=0, stop=400, step=13):
    """The tokens of rows start .. stop-1 of a stage, and the mark after each batch of `step`, by a fresh process."""
    source = opened(path, folder, tokenizer=tokenizer)
    cursor = order_of(source, 0, [seq_len], None).enter(history, seq_len, mark)
    rows, marks = [], {start: mark}
    for first in range(start, stop, step):
        last = min(first + step, stop)
        rows += tokens_of(source, cursor.rows(np.arange(first, last)))
        marks[last] = cursor.mark(last)
    source.close()
    return rows, marks


@pytest.mark.parametrize("kind", ["jsonl", "gz", "txt", "parquet", "mixed"])
def test_going_on_from_a_mark_with_an_empty_cache(tmp_path, kind):
    path = write_texts(tmp_path / "in", kind, make_texts(260, seed=3))
    expected, marks = rows_from(path, tmp_path, stop=1300)
    before = Bytes()
    opened(path, tmp_path / "opening", tokenizer=before)
    for number, cut in enumerate((13, 403, 819, 1287)):
        tokenizer = Bytes()
        rows, _ = rows_from(
            path, tmp_path / f"cold{number}", tokenizer=tokenizer, mark=marks[cut], start=cut, stop=cut + 5, step=5
        )
        assert rows == expected[cut : cut + 5]
        # what lies before the place was not tokenized again: the streams stand in few chunks
        assert tokenizer.characters < before.characters + 40 * 4000
    walked, _ = rows_from(path, tmp_path / "none", start=26, stop=60)  # without a mark the way is walked again
    assert walked == expected[26:60]


def test_the_mark_of_an_earlier_stage_is_gone_on_from(tmp_path):
    path = write_texts(tmp_path / "in", "jsonl", make_texts(300, seed=4))
    _, marks = rows_from(path, tmp_path, seq_len=100, stop=130)
    history = [Visit(100, 130, marks[130])]
    expected, _ = rows_from(path, tmp_path, history=history, seq_len=33, stop=100)
    cold, _ = rows_from(path, tmp_path / "cold", history=history, seq_len=33, stop=100)
    walked, _ = rows_from(path, tmp_path, history=[Visit(100, 130)], seq_len=33, stop=100)
    assert expected == cold == walked


@pytest.mark.parametrize("change", ["short", "kind", "crc32", "place", "row", "drawn"])
def test_a_damaged_mark_is_an_error_that_names_the_source(tmp_path, change):
    path = write_texts(tmp_path / "in", "jsonl", make_texts(100))
    _, marks = rows_from(path, tmp_path, stop=60, step=20)
    mark = list(marks[40])
    if change == "short":
        mark.pop()
    elif change == "kind":
        mark[3] = "1"
    elif change == "place":
        mark[3] += 5
    elif change == "crc32":
        mark[8] ^= 1
    elif change == "row":
        mark[-2] += 1_000_000
    source = opened(path, tmp_path)
    history = [Visit(50, 100)] if change == "drawn" else []
    with pytest.raises(ValueError, match=r"in(: the saved place|: its text, or what|/part-000.jsonl and what follows)"):
        order_of(source, 0, [50], None).enter(history, 50, mark).rows(np.arange(40, 40 + 64))


def test_the_saved_number_of_streams_is_kept(tmp_path):
    path = write_texts(tmp_path / "in", "jsonl", make_texts(100))
    source = opened(path, tmp_path)
    assert order_of(source, 0, [8], None).settings() == {"kind": "live", "streams": 64}
    assert order_of(source, 0, [8], {"kind": "live", "streams": 5}).streams == 5
    for bad in ({"kind": "live", "streams": 0}, {"kind": "live"}, {"kind": "streams", "streams": 8}):
        with pytest.raises(ValueError, match="in: the saved sample order has"):
            order_of(source, 0, [8], bad)


def test_few_documents_make_few_streams(tmp_path):
    for count, streams in ((1, 1), (3, 2), (63, 32), (64, 64)):
        path = write_texts(tmp_path / f"in{count}", "jsonl", ["word " * 100] * count, files=1)
        source = opened(path, tmp_path)
        assert source.streams == streams
        assert len(rows_from(path, tmp_path, stop=5)[0]) == 5


def test_start_up_does_not_depend_on_the_size_of_the_text(tmp_path):
    characters = []
    for count in (300, 3000):
        tokenizer = Bytes()
        opened(write_texts(tmp_path / f"in{count}", "jsonl", make_texts(count)), tmp_path, tokenizer=tokenizer)
        characters.append(tokenizer.characters)
    assert characters[0] == characters[1] < 64 * 2000


def test_a_source_is_its_content_and_tokenizer(tmp_path):
    texts = make_texts(100)
    source = opened(write_texts(tmp_path / "a", "jsonl", texts), tmp_path)
    copy = opened(write_texts(tmp_path / "b", "jsonl", texts), tmp_path / "elsewhere")
    assert copy.fingerprint == source.fingerprint
    texts[70] = texts[70][:-1] + "!"
    edited = opened(write_texts(tmp_path / "c", "jsonl", texts), tmp_path)
    other = opened(tmp_path / "b", tmp_path, tokenizer=Bytes(298))
    assert len({source.fingerprint, edited.fingerprint, other.fingerprint}) == 3


@pytest.mark.parametrize("steps", [3, 1000])
def test_validation_reads_the_rows_of_text_tokenized_before(tmp_path, steps):
    path = write_texts(tmp_path / "in", "mixed", make_texts(150, seed=9))
    cached, live = (opened(path, tmp_path, live=live) for live in (False, True))
    total = count_rows(cached, 64)
    assert min(count_rows(live, 64, steps * 4), steps * 4) == min(total, steps * 4)
    for first in range(0, min(steps * 4, total + 4), 4):
        before, now = (
            read_rows(source, first, 4, 64, document_mask=first % 8 == 0, vocab_size=300) for source in (cached, live)
        )
        for name in ("tokens_BT", "labels_BT", "cu_seqlens_BC", "ids_B"):
            assert np.array_equal(getattr(before, name), getattr(now, name))
    if steps == 3:
        assert live._reached.number < 5
        assert count_rows(live, 64) == total


@pytest.mark.parametrize("limit", ["0", "0.00005"])
def test_the_cache_is_bounded_and_what_was_removed_is_made_again(tmp_path, monkeypatch, limit):
    path = write_texts(tmp_path / "in", "gz", make_texts(400, seed=5))
    expected, _ = rows_from(path, tmp_path, stop=700)
    monkeypatch.setenv("MEGASTAGE_CACHE_GB", limit)
    monkeypatch.setattr(chunks, "_TIDY_EVERY", 1)
    rows, _ = rows_from(path, tmp_path / "tight", stop=130)
    assert rows == expected[:130]
    held = sum(f.stat().st_size for f in (tmp_path / "tight").rglob("*") if f.is_file())
    assert held < float(limit) * 1e9 + 40_000
    assert held < sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*") if f.is_file()) / 3
