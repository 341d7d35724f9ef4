"""Packing: nothing lost, nothing twice, at any length and after any history; rows nearly full."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megastage.data import compiled, packing
from megastage.data.block_rows import Pieces, best_fit_plain, pack, take_apart
from megastage.data.order import Visit, make_order
from megastage.data.packing import PackedOrder, choose_block

FINGERPRINT = bytes(range(32))


def documents(seed: int, count: int, mean: float = 60, empty: float = 0.1) -> np.ndarray:
    """Cumulative ends of documents of lognormal length, some of them empty."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(1, rng.lognormal(np.log(mean), 1.2, count)).astype(np.int64)
    lengths[rng.random(count) < empty] = 0
    lengths[0] = 5
    return np.cumsum(lengths)


def order(doc_ends: np.ndarray, block: int = 16, seed: int = 1) -> PackedOrder:
    return PackedOrder(doc_ends, block_documents=block, seed=seed, fingerprint=FINGERPRINT, name="books")


class Reader:
    """Every token must have been read as often as the least-read one: no epoch begins before the last is complete."""

    def __init__(self, doc_ends: np.ndarray) -> None:
        self.ends = doc_ends
        self.count = np.zeros(int(doc_ends[-1]), np.int64)
        self.epoch, self.left = 0, self.count.size

    def take(self, rows, seq_len: int) -> None:
        assert rows.offsets[0] == 0
        assert rows.offsets[-1] == rows.starts.size == rows.lengths.size
        assert (np.diff(rows.offsets) > 0).all()
        assert (rows.lengths > 0).all()
        assert np.add.reduceat(rows.lengths, rows.offsets[:-1]).max(initial=0) <= seq_len
        document = np.searchsorted(self.ends, rows.starts, side="right")
        assert (rows.starts + rows.lengths <= self.ends[document]).all()  # inside one document
        for start, length in zip(rows.starts.tolist(), rows.lengths.tolist()):
            assert (self.count[start : start + length] == self.epoch).all()
            self.count[start : start + length] += 1
            self.left -= length
            assert self.left >= 0
            if self.left == 0:
                self.epoch, self.left = self.epoch + 1, self.count.size


@pytest.mark.parametrize("runs", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_six_stages_five_sources_five_lengths(runs):
    rng = np.random.default_rng(3)
    epochs = 0
    for case in range(5 * runs):
        ends = documents(case, int(rng.integers(1, 150)))
        source = order(ends, int(rng.integers(1, 60)), seed=case)
        reader, history = Reader(ends), []
        for _stage in range(6):
            seq_len = int(rng.choice([64, 512, 94, 128, 37]))
            rows = int(rng.integers(0, 1 + 2 * ends[-1] // seq_len))
            cursor = source.enter(history, seq_len)
            assert cursor.skipped_tokens == 0
            reader.take(cursor.rows(np.arange(rows)), seq_len)
            history.append(Visit(seq_len, rows))
        epochs += reader.epoch
    assert epochs > 20 * runs


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=40).filter(any),
    block=st.integers(1, 20),
    stages=st.lists(st.tuples(st.integers(1, 120), st.integers(0, 60)), min_size=1, max_size=6),
)
def test_nothing_is_lost_whatever_the_documents(lengths, block, stages):
    ends = np.cumsum(lengths)
    source, reader, history = order(ends, block), Reader(ends), []
    for seq_len, rows in stages:
        reader.take(source.enter(history, seq_len).rows(np.arange(rows)), seq_len)
        history.append(Visit(seq_len, rows))


def test_any_access_gives_the_same_rows():
    ends = documents(2, 2000)
    source = order(ends, 128)
    history = [Visit(64, 100), Visit(512, 40)]

    def flat(rows):
        return [
            (rows.starts[a:b].tolist(), rows.lengths[a:b].tolist())
            for a, b in zip(rows.offsets[:-1].tolist(), rows.offsets[1:].tolist())
        ]

    whole = flat(source.enter(history, 100).rows(np.arange(3000)))
    cursor = source.enter(history, 100)
    for part in (np.array([2999]), np.arange(0, 3000, 13), np.array([0, 1, 2998]), np.array([1500]), np.arange(0)):
        assert flat(cursor.rows(part)) == [whole[c] for c in part]
    for ranks in (2, 3, 8):
        cursors = [source.enter(history, 100) for _ in range(ranks)]
        slices = np.array_split(np.arange(500, 740), ranks)
        assert [row for c, s in zip(cursors, slices) for row in flat(c.rows(s))] == whole[500:740]


def test_marks_lead_to_the_same_rows_without_packing_what_lies_before(monkeypatch):
    ends = documents(4, 3000)
    stages = [(64, 700), (512, 300), (94, 3), (94, 2000), (128, 5000)]
    plain, marked = order(ends, 64), order(ends, 64)
    history, with_marks = [], []
    for seq_len, rows in stages:
        cursor = marked.enter(with_marks, seq_len)
        assert np.array_equal(
            cursor.rows(np.arange(rows)).starts, plain.enter(history, seq_len).rows(np.arange(rows)).starts
        )
        mark = cursor.mark(rows)
        history.append(Visit(seq_len, rows))
        with_marks.append(Visit(seq_len, rows, None if mark is None else list(mark)))
    assert with_marks[1].mark is not None
    last = plain.enter(history[:-1], 128).rows(np.arange(5000, 5050))
    packed = []
    original = PackedOrder._make_block
    monkeypatch.setattr(PackedOrder, "_make_block", lambda self, *a: packed.append(a) or original(self, *a))
    fresh = order(ends, 64)
    cursor = fresh.enter(with_marks[:-1], 128, with_marks[-1].mark)
    assert np.array_equal(cursor.rows(np.arange(5000, 5050)).starts, last.starts)
    assert len(packed) <= 2 * len(stages)
    # rows before the mark are still there
    assert np.array_equal(cursor.rows(np.arange(50)).starts, plain.enter(history[:-1], 128).rows(np.arange(50)).starts)
    with pytest.raises(ValueError, match="books: the saved place"):
        order(ends, 64).enter(with_marks[:-1], 128, (0, 0))


def test_a_stage_continued_is_a_stage_uncut_when_read_on_from_a_mark():
    ends = documents(6, 800)
    whole = order(ends, 50).enter([Visit(40, 90)], 77)
    expected = whole.rows(np.arange(4000))
    for cut in (0, 1, 500, 3999):
        first = order(ends, 50).enter([Visit(40, 90)], 77)
        first.rows(np.arange(cut))
        resumed = order(ends, 50).enter([Visit(40, 90)], 77, first.mark(cut))
        got = resumed.rows(np.arange(cut, 4000))
        assert np.array_equal(got.starts, expected.starts[expected.offsets[cut] :])
        assert np.array_equal(got.lengths, expected.lengths[expected.offsets[cut] :])


def test_epochs_follow_the_tokens_read():
    ends = documents(8, 1000)
    source, history, read = order(ends, 64), [], 0
    for seq_len, rows in ((64, 300), (512, 200), (37, 2000)):
        cursor = source.enter(history, seq_len)
        assert cursor.epoch_at(0) == pytest.approx(read / ends[-1], abs=64 / 1000 + 0.01)
        read += int(cursor.rows(np.arange(rows)).lengths.sum())
        assert cursor.epoch_at(rows) == pytest.approx(read / ends[-1], abs=64 / 1000 + 0.01)
        values = [cursor.epoch_at(c) for c in range(rows)]
        assert (np.diff(values) > -64 / 1000).all()
        history.append(Visit(seq_len, rows))
    assert source.planned_epochs(history) == pytest.approx(read / ends[-1], rel=0.05)


@pytest.mark.parametrize(("seq_len", "fill"), [(4096, 0.998), (32_768, 0.99)])
def test_rows_are_full(seq_len, fill):
    """At 600 tokens a document and the block size that is chosen for the length."""
    ends = documents(9, 40_000, mean=300)
    source = make_order("packed", seed=1, fingerprint=FINGERPRINT, lengths=[seq_len], doc_ends=ends)
    count = int(ends[-1] * 0.8) // seq_len
    assert source.enter([], seq_len).rows(np.arange(count)).lengths.sum() >= fill * count * seq_len


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), max_size=120), st.integers(200, 260))
def test_best_fit_puts_each_item_into_the_fullest_bin_that_holds_it(lengths, capacity):
    lengths = np.sort(np.array(lengths, np.int64))[::-1].copy()
    rooms: list[int] = []
    bins = best_fit_plain(lengths, capacity)
    for length, target in zip(lengths.tolist(), bins.tolist()):
        fitting = [room for room in rooms if room >= length]
        if target == len(rooms):
            assert not fitting
            rooms.append(capacity)
        else:
            assert rooms[target] == min(fitting)
        rooms[target] -= length
        assert rooms[target] >= 0
    fast = compiled.best_fit()
    if fast is not None:
        assert np.array_equal(fast(lengths, capacity), bins)


def test_compiled_best_fit_at_real_sizes():
    fast = compiled.best_fit()
    if fast is None:
        pytest.skip("numba is not installed")
    rng = np.random.default_rng(0)
    for capacity in (63, 64, 65, 4095, 4096, 32_768, 131_072):
        lengths = np.sort(np.clip(rng.lognormal(6, 1.3, 4096), 1, capacity).astype(np.int64))[::-1].copy()
        assert np.array_equal(fast(lengths, capacity), best_fit_plain(lengths, capacity))


def test_pieces_given_back_are_joined_within_a_document_only():
    """Two documents that touch in the stream stay apart; the three parts of a cut one become one again."""
    pieces = Pieces(np.array([0, 1]), np.array([10, 35]), np.array([25, 4]))
    packed = pack(pieces, 10, key=5)
    back = take_apart(packed, 0)
    assert back.starts.tolist() == [10, 35]
    assert back.lengths.tolist() == [25, 4]
    first = packed.pieces.lengths[: packed.offsets[1]].sum()
    assert take_apart(packed, 1).lengths.sum() == 29 - first
    assert take_apart(packed, packed.n_rows).lengths.size == 0


def test_block_size_follows_lengths_and_documents():
    assert choose_block([4096], 10**7, 6 * 10**9) == 4096
    assert choose_block([4096, 32_768], 10**7, 6 * 10**9) == 16_384
    assert choose_block([4096], 1000, 10**9) == packing.MAX_BLOCK_TOKENS // 10**6
    assert choose_block([4096], 2, 2**40) == 1


def test_settings_fix_the_order():
    ends = documents(1, 500)
    first = make_order("packed", seed=2, fingerprint=FINGERPRINT, lengths=[64], doc_ends=ends.astype(np.uint64))
    saved = first.settings()
    again = make_order("packed", seed=2, fingerprint=FINGERPRINT, lengths=[40_000], doc_ends=ends, settings=saved)
    assert again.settings() == saved
    rows = first.enter([], 64).rows(np.arange(900))
    assert np.array_equal(again.enter([], 64).rows(np.arange(900)).starts, rows.starts)
    with pytest.raises(ValueError, match="books: the saved sample order has n_documents = 500"):
        make_order("packed", seed=2, fingerprint=b"", lengths=[64], doc_ends=ends[:-1], settings=saved, name="books")


@pytest.mark.parametrize("ends", [[], [0], [0, 0, 0]])
def test_nothing_to_read_is_an_error(ends):
    with pytest.raises(ValueError, match=r"books: .* nothing to read"):
        make_order("packed", seed=1, fingerprint=b"", lengths=[8], doc_ends=np.array(ends, np.int64), name="books")


def test_order_is_the_one_of_all_releases():
    rows = order(np.arange(7, 7007, 7)).enter([Visit(50, 33)], 30).rows(np.array([0, 1, 40, 2000]))
    assert (rows.offsets.tolist(), rows.starts.tolist(), rows.lengths.tolist()) == GOLDEN


GOLDEN = (
    [0, 4, 8, 12, 15],
    [623, 3514, 6314, 1358, 1722, 833, 1561, 6426, 455, 1323, 273, 1456, 2093, 2912, 2681],
    [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7],
)
