"""Virtual streams against a reading of every stream token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megastage.data.order import Visit, make_order
from megastage.data.streams import StreamOrder


class TokenByToken:
    """Each stream as an endless list of token numbers; rows are taken from its front."""

    def __init__(self, lengths: list[int], streams: int) -> None:
        ends = np.cumsum(lengths).tolist()
        full = [list(range(end - n, end)) for n, end in zip(lengths, ends) if n]
        self.streams = [full[s::streams] for s in range(streams)]
        self.tokens = [[t for document in stream for t in document] for stream in self.streams]
        self.at = [0] * streams
        self.drawn = 0

    def row(self, seq_len: int) -> list[int]:
        s = self.drawn % len(self.streams)
        self.drawn += 1
        tokens = self.tokens[s]
        row = [tokens[(self.at[s] + i) % len(tokens)] for i in range(seq_len)]
        self.at[s] += seq_len
        return row


def tokens_of(rows) -> list[list[int]]:
    """The token numbers of each row, piece by piece."""
    pieces = [list(range(s, s + n)) for s, n in zip(rows.starts.tolist(), rows.lengths.tolist())]
    bounds = zip(rows.offsets[:-1].tolist(), rows.offsets[1:].tolist())
    return [[token for piece in pieces[a:b] for token in piece] for a, b in bounds]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any),
    streams=st.integers(1, 5),
    stages=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 25)), min_size=1, max_size=5),
)
def test_rows_are_those_of_the_streams(lengths, streams, stages):
    streams = min(streams, sum(n > 0 for n in lengths))
    ends = np.cumsum(lengths)
    source, oracle, history = StreamOrder(ends, streams=streams), TokenByToken(lengths, streams), []
    for seq_len, count in stages:
        cursor = source.enter(history, seq_len)
        assert cursor.epoch_at(0) * ends[-1] == pytest.approx(sum(oracle.at))
        rows = cursor.rows(np.arange(count))
        expected = [oracle.row(seq_len) for _ in range(count)]
        assert tokens_of(rows) == expected
        assert (rows.lengths > 0).all()
        document = np.searchsorted(ends, rows.starts, side="right")
        assert (rows.starts + rows.lengths <= ends[document]).all()
        some = np.arange(count)[::3]
        assert tokens_of(cursor.rows(some)) == expected[::3]
        history.append(Visit(seq_len, count))
    assert source.planned_epochs(history) * ends[-1] == pytest.approx(sum(oracle.at))


def test_pieces_end_with_their_documents():
    rows = StreamOrder(np.array([3, 3, 8, 10]), streams=2).enter([], 4).rows(np.arange(3))
    # stream 0: documents 0 and 3 (the empty one does not count), stream 1: document 2
    assert tokens_of(rows) == [[0, 1, 2, 8], [3, 4, 5, 6], [9, 0, 1, 2]]
    assert rows.lengths.tolist() == [3, 1, 4, 1, 3]
    assert rows.offsets.tolist() == [0, 2, 3, 5]


def test_far_rows():
    source = StreamOrder(np.cumsum([7, 11, 13]), streams=3)
    cursor = source.enter([Visit(5, 10**12)], 64)
    for counter in (0, 10**12):
        row = cursor.rows(np.array([counter]))
        assert row.lengths.sum() == 64
        stream = (10**12 + counter) % 3
        assert row.starts.min() >= [0, 7, 18][stream]
        assert (row.starts + row.lengths).max() <= [7, 18, 31][stream]


def test_number_of_streams_is_fixed_at_the_first_start():
    def make(n, settings=None, name="text"):
        return make_order(
            "streams",
            seed=0,
            fingerprint=b"",
            lengths=[8],
            doc_ends=np.arange(3, 3 * n + 1, 3),
            settings=settings,
            name=name,
        )

    assert [make(n).settings()["streams"] for n in (1, 2, 3, 63, 64, 1000)] == [1, 2, 2, 32, 64, 64]
    saved = {**make(100).settings(), "streams": 7}
    assert make(100, saved).settings() == saved
    with pytest.raises(ValueError, match="text: the saved sample order has n_documents"):
        make(101, saved)


def test_streams_without_text_are_an_error():
    with pytest.raises(ValueError, match="text: 2 documents with text cannot feed 3 streams"):
        StreamOrder(np.array([1, 1, 5]), streams=3, name="text")
    with pytest.raises(ValueError, match="text: 0 documents"):
        make_order("streams", seed=0, fingerprint=b"", lengths=[8], doc_ends=np.zeros(3, np.int64), name="text")


def test_unknown_kind():
    with pytest.raises(ValueError, match="'heap'"):
        make_order("heap", seed=0, fingerprint=b"", lengths=[8], doc_ends=np.array([1]))
