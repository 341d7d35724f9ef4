"""Lanes: every window inside the source, no token twice in an epoch, what is lost is what the formulas say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megastage.data.lanes import LaneOrder, choose_lanes, choose_superblock
from megastage.data.order import Visit, make_order

FINGERPRINT = bytes(range(32))


def order(n_tokens: int, superblock: int, lanes: int, seed: int = 1) -> LaneOrder:
    return LaneOrder(n_tokens, superblock=superblock, lanes=lanes, seed=seed, fingerprint=FINGERPRINT, name="web")


def starts(cursor, start: int, stop: int) -> np.ndarray:
    return cursor.rows(np.arange(start, stop)).starts


class Reader:
    """Counts, by marking single tokens, how often each is read in each epoch."""

    def __init__(self, n_tokens: int) -> None:
        self.usable = n_tokens - 1
        self.read: dict[int, np.ndarray] = {}

    def take(self, cursor, seq_len: int, rows: int) -> None:
        got = cursor.rows(np.arange(rows))
        assert got.offsets.tolist() == list(range(rows + 1))
        assert (got.lengths == seq_len).all()
        for counter, start in enumerate(got.starts.tolist()):
            epoch = cursor.frontier(counter + 1).epoch
            counts = self.read.setdefault(epoch, np.zeros(self.usable, np.int8))
            assert start >= 0
            assert start + seq_len <= self.usable  # so that the label of the last token exists
            counts[start : start + seq_len] += 1
            assert counts[start : start + seq_len].max() == 1, (epoch, counter)

    def unread(self, epoch: int) -> int:
        return int((self.read[epoch] == 0).sum())


@pytest.mark.parametrize("runs", [12, pytest.param(120, marks=pytest.mark.slow)])
def test_six_stages_five_sources_five_lengths(runs):
    """Random sizes; lengths that divide nothing; stages from a few rows to several epochs."""
    rng = np.random.default_rng(5)
    finished = 0
    for _ in range(runs):
        for _source in range(5):
            n_tokens = int(rng.integers(3000, 30_000))
            source = order(n_tokens, int(rng.choice([512, 600, 1024, 2100])), int(rng.integers(1, 9)), seed=7)
            reader, history, skipped = Reader(n_tokens), [], {}
            for _stage in range(6):
                seq_len = int(rng.choice([64, 512, 94, 128, 37]))
                rows = int(rng.integers(0, 2 * n_tokens // seq_len))
                cursor = source.enter(history, seq_len)
                if rows:
                    epoch = cursor.frontier(1).epoch
                    skipped[epoch] = skipped.get(epoch, 0) + source.lanes * (seq_len - 1)
                reader.take(cursor, seq_len, rows)
                history.append(Visit(seq_len, rows))
            epochs = sorted(reader.read)
            assert epochs == list(range(len(epochs)))
            for epoch in epochs[:-1]:
                N, S = source.n_superblocks, source.superblock
                bound = N * max(S % v.seq_len for v in history) + (n_tokens - 1 - N * S)
                # an entry may also lie in the epoch before, when that one ended with its last group open
                bound += skipped.get(epoch, 0) + skipped.get(epoch + 1, 0)
                assert reader.unread(epoch) <= bound
                finished += 1
    assert finished > 17 * runs


def test_lost_tokens_are_exactly_those_reported():
    """Lengths that divide the superblock, each stage longer than the tails: nothing is lost but at the entries."""
    n_tokens = 40 * 1024 + 321
    source = order(n_tokens, 1024, 6)
    reader, history, given_up = Reader(n_tokens), [], 0
    for seq_len, rows in ((64, 125), (512, 20), (128, 71), (1024, 3), (256, 20)):
        cursor = source.enter(history, seq_len)
        given_up += cursor.skipped_tokens
        reader.take(cursor, seq_len, rows)
        history.append(Visit(seq_len, rows))
    assert set(reader.read) == {0}
    cursor = source.enter(history, 256)
    assert cursor.skipped_tokens == 0  # going on at the same length
    reader.take(cursor, 256, 160)
    assert set(reader.read) == {0, 1}
    assert given_up > 0
    assert reader.unread(0) == given_up + 321 - 1


@pytest.mark.parametrize(
    ("n_tokens", "superblock", "seq_len"), [(10_001, 1000, 100), (9_999, 600, 250), (777, 512, 512)]
)
def test_end_of_an_epoch_at_one_length(n_tokens, superblock, seq_len):
    source = order(n_tokens, superblock, 3)
    rows = source.n_superblocks * (superblock // seq_len)
    reader = Reader(n_tokens)
    reader.take(source.enter([], seq_len), seq_len, 3 * rows)
    N = (n_tokens - 1) // superblock
    expected = N * (superblock % seq_len) + (n_tokens - 1) - N * superblock
    assert [reader.unread(epoch) for epoch in range(3)] == [expected] * 3
    assert source.unread_tokens(seq_len) == expected
    assert source.planned_epochs([Visit(seq_len, 3 * rows)]) == pytest.approx(3)
    if expected:  # another end is out of reach each time
        unread = [reader.read[epoch] == 0 for epoch in range(3)]
        assert not np.array_equal(unread[0], unread[1])


@settings(max_examples=60, deadline=None)
@given(
    n_tokens=st.integers(1200, 6000),
    superblock=st.integers(100, 1100),
    lanes=st.integers(1, 9),
    data=st.data(),
)
def test_same_length_again_goes_on_as_if_uncut(n_tokens, superblock, lanes, data):
    source = order(n_tokens, superblock, lanes)
    seq_len = data.draw(st.integers(1, min(100, superblock)))
    before = [Visit(data.draw(st.integers(20, 100)), data.draw(st.integers(1, 80)))]
    whole = source.enter(before, seq_len)
    cuts = sorted(data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=4)))
    history, at = list(before), 0
    for cut in cuts:
        part = source.enter(history, seq_len)
        assert np.array_equal(starts(part, 0, cut - at + 5), starts(whole, at, cut + 5))
        history.append(Visit(seq_len, cut - at))
        at = cut
    assert np.array_equal(starts(source.enter(history, seq_len), 0, 50), starts(whole, at, at + 50))


def test_any_access_gives_the_same_rows():
    source = order(50_000, 1000, 7)
    cursor = source.enter([Visit(64, 333), Visit(250, 61)], 90)
    whole = starts(cursor, 0, 3000)
    for part in (np.array([2999]), np.arange(5, 2000, 7), np.arange(3000)[::-1], np.empty(0, np.int64)):
        assert np.array_equal(cursor.rows(part).starts, whole[part])
    assert np.array_equal([starts(cursor, c, c + 1)[0] for c in range(0, 3000, 17)], whole[::17])
    for ranks in (1, 2, 3, 8):  # slices of a batch, in rank order
        parts = [
            source.enter([Visit(64, 333), Visit(250, 61)], 90).rows(p).starts
            for p in np.array_split(np.arange(1000, 1240), ranks)
        ]
        assert np.array_equal(np.concatenate(parts), whole[1000:1240])


def test_a_far_row_is_found_at_once_and_right():
    source = order(10**9, 4096, 512)
    cursor = source.enter([Visit(512, 10**7), Visit(4096, 10**8)], 2048)
    far = cursor.rows(np.arange(10**12, 10**12 + 100))
    assert (far.starts >= 0).all()
    assert far.starts.max() + 2048 <= 10**9 - 1
    epochs = cursor.epoch_at(10**12) - cursor.epoch_at(0)
    assert epochs == pytest.approx(10**12 * 2048 / (10**9 // 4096 * 4096), rel=1e-6)


def test_epochs_grow_row_by_row():
    source = order(20_000, 500, 6)
    history: list[Visit] = []
    last = 0.0
    for seq_len, rows in ((50, 130), (120, 40), (33, 300), (500, 70), (77, 1000)):
        cursor = source.enter(history, seq_len)
        values = [cursor.epoch_at(c) for c in range(rows + 1)]
        assert values[0] >= last - 1e-12
        assert (np.diff(values) > 0).all()
        last = values[-1]
        history.append(Visit(seq_len, rows))
    assert last == pytest.approx(source.planned_epochs(history), abs=0.1)


def test_neighbouring_rows_come_from_distant_superblocks():
    """A batch no larger than the lanes never holds two windows of one superblock, whatever the stage's length."""
    source = order(4096 * 400 + 1, 4096, 20)
    for seq_len in (256, 1024, 4096):
        rows = source.enter([], seq_len).rows(np.arange(20 * (4096 // seq_len) * 20))
        block = rows.starts // 4096
        batches = block[: block.size // 20 * 20].reshape(-1, 20)
        assert all(len(set(batch.tolist())) == 20 for batch in batches)


def test_after_a_change_of_length_all_lanes_take_turns():
    """Also when some were read further than others: a batch of the open group has one window of each lane."""
    source = order(4096 * 30 + 1, 4096, 6)
    cursor = source.enter([Visit(1024, 6 + 2), Visit(512, 4)], 256)  # six lanes; tails of 2048 to 2560 tokens
    block = starts(cursor, 0, 60) // 4096
    assert all(len(set(turn.tolist())) == 6 for turn in block[:48].reshape(8, 6))


def test_seeds_epochs_and_sources_have_orders_of_their_own():
    base = starts(order(10**6, 512, 40).enter([], 512), 0, 200)
    assert not np.array_equal(base, starts(order(10**6, 512, 40, seed=2).enter([], 512), 0, 200))
    other = LaneOrder(10**6, superblock=512, lanes=40, seed=1, fingerprint=bytes(32))
    assert not np.array_equal(base, starts(other.enter([], 512), 0, 200))
    per_epoch = 10**6 // 512
    assert not np.array_equal(base, starts(order(10**6, 512, 40).enter([], 512), per_epoch, per_epoch + 200))


@pytest.mark.parametrize(
    ("lengths", "multiple"),
    [((4096, 32_768), 1), ((4096, 32_768, 6000), 7), ((4096, 32_768, 5000, 6000), 11), ((512,), 1)],
)
def test_superblock_of_large_sources(lengths, multiple):
    size = choose_superblock(lengths, 10**12)
    assert size == multiple * max(lengths)
    assert all(size % length <= size * 0.01 for length in lengths)


@pytest.mark.parametrize("n_tokens", [4097, 4100, 8192, 20_000, 100_000])
def test_small_sources_work_at_all_their_lengths(n_tokens):
    lengths = [512, 1000, 4096]
    source = make_order("lanes", seed=1, fingerprint=FINGERPRINT, lengths=lengths, n_tokens=n_tokens)
    assert source.settings()["superblock"] == 4096
    reader, history = Reader(n_tokens), []
    for seq_len in (512, 4096, 1000, 512):
        rows = 2 * n_tokens // seq_len
        reader.take(source.enter(history, seq_len), seq_len, rows)
        history.append(Visit(seq_len, rows))


def test_small_sources_are_cut_finer_where_it_helps_only():
    assert choose_superblock([4096, 6000], 40_000) == 6000  # a single superblock must not hold all
    assert choose_superblock([4096, 6000], 10**9) == 66_000  # 16 windows of 4096 leave 464, 0.7 %
    assert choose_lanes(10**9, 4096) == 495  # ceil(sqrt(244140))
    assert choose_lanes(10**12, 4096) == 1024
    assert choose_lanes(4097, 4096) == 1


def test_too_few_tokens_and_too_long_rows_name_the_source():
    with pytest.raises(
        ValueError, match=r"books: 4096 tokens are too few for one row of seq_len 4096, which reads 4097"
    ):
        make_order("lanes", seed=1, fingerprint=b"", lengths=[512, 4096], n_tokens=4096, name="books")
    with pytest.raises(ValueError, match=r"web: 512 tokens hold no superblock of 512"):
        order(512, 512, 1)
    with pytest.raises(
        ValueError, match=r"web: seq_len 1024 does not fit the superblocks of 512 .* dataset_random_seed"
    ):
        order(5000, 512, 2).enter([Visit(512, 3)], 1024)
    with pytest.raises(ValueError, match="web: seq_len 0"):
        order(5000, 512, 2).enter([], 0)


def test_saved_settings_make_the_same_order_when_a_later_stage_is_edited():
    first = make_order("lanes", seed=3, fingerprint=FINGERPRINT, lengths=[512, 4096], n_tokens=10**6)
    saved = first.settings()
    again = make_order("lanes", seed=3, fingerprint=FINGERPRINT, lengths=[512, 3000], n_tokens=10**6, settings=saved)
    assert again.settings() == saved
    history = [Visit(512, 700)]
    assert np.array_equal(starts(first.enter([], 512), 0, 999), starts(again.enter([], 512), 0, 999))
    again.enter(history, 3000)
    for changed in ({"n_tokens": 10**6 + 1}, {"seed": 4}):
        arguments = {"seed": 3, "n_tokens": 10**6, **changed}
        with pytest.raises(ValueError, match=f"web: the saved sample order has {next(iter(changed))}"):
            make_order("lanes", fingerprint=FINGERPRINT, lengths=[512], settings=saved, name="web", **arguments)
    with pytest.raises(ValueError, match="kind"):
        make_order(
            "streams", seed=3, fingerprint=FINGERPRINT, lengths=[512], doc_ends=np.array([10**6]), settings=saved
        )


def test_order_is_the_one_of_all_releases():
    cursor = order(10**7, 4096, 49).enter([Visit(1000, 77)], 512)
    assert cursor.rows(np.array([0, 1, 1000, 20_000, 10**6])).starts.tolist() == GOLDEN


GOLDEN = [9902187, 4683883, 4944515, 3647639, 8925705]
