"""Text tokenized while it is read, against the same text tokenized before."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from live_texts import KINDS, Bytes, make_texts, write_texts

from megastage.data.index import order_of
from megastage.data.order import Visit
from megastage.data.sources import chunks, text
from megastage.data.sources.base import SourceError, SourceOptions, open_source
from megastage.data.sources.live import LiveText


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of a few documents, of which few are kept open."""
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


@pytest.mark.parametrize("eos_id", [299, None])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_text_that_was_tokenized_before(tmp_path, kind, eos_id):
    texts = make_texts(200)
    path = write_texts(tmp_path / "in", kind, texts)
    cached, live = (opened(path, tmp_path, live=live, tokenizer=Bytes(eos_id)) for live in (False, True))
    before, now = (order_of(source, 0, [64], None) for source in (cached, live))
    assert (now.streams, live.streams) == (before.streams, before.streams)
    history = []
    for seq_len, count in ((64, 150), (17, 301), (500, 90), (64, 700)):  # some three epochs
        cursors = [order.enter(history, seq_len) for order in (before, now)]
        done = 0
        while done < count:
            counters = np.arange(done, min(done + 37, count))
            expected, found = (cursor.rows(counters) for cursor in cursors)
            assert same_rows(expected, found)
            assert tokens_of(cached, expected) == tokens_of(live, found)
            done += len(counters)
        history.append(Visit(seq_len, count, cursors[1].mark(count)))
    assert live.n_tokens == cached.n_tokens
