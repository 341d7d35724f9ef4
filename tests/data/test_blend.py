"""The blend: exact weights, Tijdeman's bound in integers, one period that repeats, random access."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megastage.data import blend, compiled
from megastage.data.blend import MAX_PERIOD, BlendTable, integer_weights, is_exact


def worst_case(table: BlendTable) -> Fraction:
    """Largest |c_i(n) - n w_i / W| over all sources and prefixes of one period, relative to the bound 1 - 1/(2k-2).

    The error of a source falls between its draws and jumps at them, so its extremes lie just before and after a draw.
    """
    w, W = table.weights, table.period
    M = 2 * np.count_nonzero(w) - 2
    n = np.arange(1, W + 1)
    share = w[table.source]
    rank = table.rank.astype(np.int64)
    after = np.abs((rank + 1) * W - n * share).max()
    before = np.abs(rank * W - (n - 1) * share).max()
    return Fraction(int(max(after, before)) * M, W * (M - 1))


def rule_by_scan(weights: list[int], slots: int) -> list[int]:
    """The rule as it is stated, slot by slot with unbounded integers: no period, no heap, no table."""
    live = [i for i, w in enumerate(weights) if w]
    W, M = sum(weights), 2 * len(live) - 2
    drawn = dict.fromkeys(live, 0)
    order = []
    for slot in range(1, slots + 1):
        released = []
        for i in live:
            den, c = M * weights[i], drawn[i]
            if -(-((c * M + 1) * W) // den) <= slot:
                released.append((((c * M + M - 1) * W) // den + 1, i))
        deadline, i = min(released)
        assert deadline >= slot
        drawn[i] += 1
        order.append(i)
    return order


def partitions(total: int, parts: int, largest: int | None = None):
    largest = total if largest is None else largest
    if parts == 1:
        if total <= largest:
            yield (total,)
        return
    for first in range(min(largest, total - parts + 1), 0, -1):
        if first * parts < total:
            break
        for rest in partitions(total - first, parts - 1, first):
            yield (first, *rest)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.5, 0.3, 0.2], [5, 3, 2]),
        ([0.1] * 10, [1] * 10),
        ([1 / 3] * 3, [1, 1, 1]),
        ([0.3, 0.35, 0.35], [6, 7, 7]),
        ([0.999999, 1e-6], [999_999, 1]),
        ([0.0, 0.25, 0.75], [0, 1, 3]),
        ([7, 0, 21], [1, 0, 3]),
        ([2.5], [1]),
        ([1e300, 3e300], [1, 3]),
        ([5e-324, 1e-323], [1, 2]),  # the two smallest floats, read as their decimals 5e-324 and 1e-323
        (list(np.array([0.25, 0.75])), [1, 3]),
    ],
)
def test_weights_are_read_as_decimals(weights, expected):
    result = integer_weights(weights)
    assert result.tolist() == expected
    assert result.dtype == np.int64
    assert is_exact(weights, result)


def test_token_counts_as_weights_are_rounded_and_said_to_be():
    counts = [1_234_567_891, 987_654_323, 1_000_003, 7]
    result = integer_weights(counts)
    assert not is_exact(counts, result)
    assert result.sum() == MAX_PERIOD
    assert result[3] == 1  # 0.003 of a unit
    total = sum(counts)
    for n, count in zip(result[:3].tolist(), counts):
        assert abs(Fraction(n, MAX_PERIOD) - Fraction(count, total)) < Fraction(
            2, MAX_PERIOD
        )  # its own rounding and its part of the unit given away


def test_rounding_error_of_harmonic_weights():
    weights = [1 / (i + 1) for i in range(64)]
    result = integer_weights(weights)
    share = np.array(weights) / sum(weights)
    assert not is_exact(weights, result)
    assert np.abs(result / result.sum() - share).max() < 5.1e-7
    assert np.abs(result / result.sum() / share - 1).max() < 2e-4


def test_every_positive_weight_is_drawn_however_small():
    weights = [1.0] + [1e-9] * 30_000 + [0.0]
    result = integer_weights(weights)
    assert result.tolist() == [MAX_PERIOD - 30_000] + [1] * 30_000 + [0]
    assert not is_exact(weights, result)
    # rounding up the small ones may push another one below a unit: it then gets one as well
    edge = integer_weights([1.0] + [1.04 / 2**20] + [1e-9] * 30_000)
    assert edge[1] == 1
    assert edge.sum() == MAX_PERIOD


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "0 weights"),
        ([1] * 40_000, "40000 weights"),
        ([0.5, float("nan")], r"dataset_weights\[1\] = nan"),
        ([float("inf")], r"dataset_weights\[0\] = inf"),
        ([0.5, -0.5], r"dataset_weights\[1\] = -0.5"),
        ([0.0, 0], "all 2 weights are zero"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        integer_weights(weights)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [[1, 2]], [2**24, 1], [2**24 - 32_000] + [1] * 32_000])
def test_bad_integer_weights(weights):
    with pytest.raises(ValueError, match="integer weights"):
        BlendTable.build(weights)


@pytest.mark.parametrize(
    "weights", [[5, 3, 2], [1, 1], [7, 1], [3, 0, 3, 1], [1, 2, 3, 4, 5], [50, 1, 1, 1], [9, 9, 9, 1, 0, 1], [2, 3, 97]]
)
def test_table_is_the_stated_rule_over_three_periods(weights):
    table = BlendTable.build(weights)
    n = 3 * table.period
    expected = rule_by_scan(weights, n)
    source, counter = table.draws(0, n)
    assert source.tolist() == expected
    seen = dict.fromkeys(range(len(weights)), 0)
    for at, i in enumerate(expected):
        assert counter[at] == seen[i]
        assert table.counts_at(at).tolist() == list(seen.values())
        seen[i] += 1


def test_bound_holds_and_is_attained_over_all_small_mixes():
    """Every mix of 2 to 8 sources up to these periods."""
    cases, worst = 0, Fraction(0)
    for parts, most in ((2, 200), (3, 80), (4, 48), (5, 36), (6, 30), (7, 28), (8, 26)):
        for total in range(parts, most + 1):
            for mix in partitions(total, parts):
                worst = max(worst, worst_case(BlendTable.build(mix)))
                cases += 1
    assert cases == 47_725
    assert worst == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=2, max_size=40))
def test_bound_for_random_weights(weights):
    table = BlendTable.build(weights)
    assert worst_case(table) <= 1
    assert np.array_equal(table.counts_at(table.period), table.weights)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=12).filter(any))
def test_bound_for_weights_from_text(weights):
    integers = integer_weights(weights)
    assert ((integers > 0) == (np.array(weights) > 0)).all()
    if np.count_nonzero(integers) > 1:
        assert worst_case(BlendTable.build(integers)) <= 1


NAMED = {
    "one_big_63_small": [0.9] + [0.1 / 63] * 63,
    "one_big_999_small": [0.9] + [0.1 / 999] * 999,
    "a_millionth": [0.999999, 1e-6],
    "1000_millionths": [0.999] + [1e-6] * 1000,
    "harmonic_64": [1 / (i + 1.01) for i in range(64)],
    "halving": [2.0**-i for i in range(20)],
    "golden_ratio": [0.6180339887498949, 0.3819660112501051],
    "equal_30000": [1 / 30_000] * 30_000,
    "zipf_30000": [1 / (i + 1) for i in range(30_000)],
}


@pytest.mark.parametrize("name", NAMED)
def test_bound_at_the_largest_period(name):
    if compiled.blend_period() is None and name not in ("a_millionth", "zipf_30000"):
        pytest.skip("plain Python takes a second a case")
    assert worst_case(BlendTable.build(integer_weights(NAMED[name]))) <= 1


def test_plain_and_compiled_builders_agree():
    fast = compiled.blend_period()
    if fast is None:
        pytest.skip("numba is not installed")
    rng = np.random.default_rng(1)
    cases = [rng.integers(1, 60, rng.integers(2, 90)) for _ in range(60)]
    cases += [np.array([1, 1]), np.array([500, 1]), np.ones(300, np.int64), integer_weights(NAMED["harmonic_64"])]
    for weights in cases:
        source, rank = fast(weights, int(weights.sum()))
        plain_source, plain_rank = blend._period_plain(weights)
        assert np.array_equal(source, plain_source)
        assert np.array_equal(rank, plain_rank)


def test_without_numba_the_same_draws():
    code = (
        "import sys; from megastage.data.blend import *;"
        "print(BlendTable.build(integer_weights([1 / (i + 1) for i in range(5)])).crc32);"
        "assert 'numba' not in sys.modules"
    )
    env = {"MEGASTAGE_NUMBA": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) == BlendTable.build(integer_weights([1 / (i + 1) for i in range(5)])).crc32


@pytest.mark.parametrize("weights", [[5, 3, 2], [1], [0, 4, 0], [1] * 1000, [1 << 19, (1 << 19) - 1]])
def test_any_range_is_a_part_of_the_whole(weights):
    table = BlendTable.build(weights)
    source, counter = table.expand(50_000)
    assert (source.dtype, counter.dtype) == (np.int16, np.int64)
    for start, stop in ((0, 0), (0, 1), (7, 1000), (16_000, 50_000), (49_999, 50_000)):
        part = table.draws(start, stop)
        assert np.array_equal(part[0], source[start:stop])
        assert np.array_equal(part[1], counter[start:stop])
    assert np.array_equal(table.counts_at(43_210), np.bincount(source[:43_210], minlength=len(weights)))


def test_far_positions_are_exact():
    table = BlendTable.build([5, 3, 2])
    far = 10**15 + 3
    source, counter = table.draws(far, far + 100_000)
    assert np.array_equal(source, table.draws(3, 100_003)[0])
    before = table.counts_at(far)
    assert before.sum() == far
    for i in range(3):
        own = counter[source == i]
        assert np.array_equal(own, before[i] + np.arange(own.size))


def test_one_source_and_unused_sources():
    table = BlendTable.build([0, 0, 9])
    assert table.period == 1
    source, counter = table.draws(5, 9)
    assert source.tolist() == [2] * 4
    assert counter.tolist() == [5, 6, 7, 8]
    table = BlendTable.build([3, 0, 1])
    assert set(table.source.tolist()) == {0, 2}
    assert table.counts_at(8).tolist() == [6, 0, 2]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4)])
def test_bad_ranges(start, stop):
    with pytest.raises(ValueError, match="draws"):
        BlendTable.build([1, 1]).draws(start, stop)


def test_the_table_survives_its_broadcast():
    table = BlendTable.build([5, 0, 3, 2])
    copy = BlendTable.from_source(table.weights, table.source.copy())
    assert np.array_equal(copy.rank, table.rank)
    assert copy.crc32 == table.crc32
    wrong = table.source.copy()
    wrong[0] = 1
    with pytest.raises(ValueError, match="draw order"):
        BlendTable.from_source(table.weights, wrong)


def test_draw_order_is_the_one_of_all_releases():
    """Checkpoints depend on it. Taken from this code when it agreed with the rule as stated, draw for draw."""
    assert BlendTable.build([5, 3, 2]).source.tolist() == [0, 1, 0, 2, 0, 1, 0, 2, 0, 1]
    assert BlendTable.build([5, 3, 2]).crc32 == GOLDEN["532"]
    assert BlendTable.build([2, 3, 5]).crc32 == GOLDEN["235"]  # the order of the sources decides ties
    assert BlendTable.build(integer_weights(NAMED["harmonic_64"])).crc32 == GOLDEN["harmonic_64"]


GOLDEN = {"532": 3540694794, "235": 670826055, "harmonic_64": 3724449486}
