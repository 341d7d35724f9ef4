"""Which source the n-th sample of a stage comes from: exact shares, random access, nothing to store per sample.

The rule is Tijdeman's (The chairman assignment problem, Discrete Mathematics 32, 1980): after every prefix of n draws,
source i has been drawn within 1 - 1/(2k-2) of n w_i / W times, for k sources of integer weights w_i and W = sum w_i.
The draw order has period W, so one period is kept as a table and any position is a look-up.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from heapq import heappop, heappush
from typing import SupportsFloat

import numpy as np

from megastage.data import compiled

MAX_PERIOD = 1 << 20  # a table of at most 6 MB; every mix written with up to six decimals that sums to 1 is exact
MAX_SOURCES = 32_767  # source numbers are int16
COMPILE_FROM = 1 << 14  # shorter periods are built faster than numba is imported
BLOCK = 1 << 14  # short periods are repeated to about this length, so that long ranges are copied in few pieces


def integer_weights(weights: Sequence[SupportsFloat]) -> np.ndarray:
    """Smallest integers in the proportions of `weights`, int64[k]; zero stays zero.

    Every weight is read as the decimal that it prints as (0.1 is one tenth), so 0.5/0.3/0.2 gives 5/3/2. When the
    exact integers sum to more than `MAX_PERIOD`, they are rounded to that sum by largest remainder, with at least 1
    for each positive weight; `is_exact` tells.

    Raises ValueError for no weights, a negative or non-finite weight, no positive weight, or too many sources.
    """
    exact = _fractions(weights)
    scale = math.lcm(*(f.denominator for f in exact))
    integers = [f.numerator * (scale // f.denominator) for f in exact]
    divisor = math.gcd(*integers)
    integers = [n // divisor for n in integers]
    if sum(integers) > MAX_PERIOD:
        integers = _largest_remainder(integers, MAX_PERIOD)
        divisor = math.gcd(*integers)
        integers = [n // divisor for n in integers]
    return np.array(integers, np.int64)


def is_exact(weights: Sequence[SupportsFloat], integers: np.ndarray) -> bool:
    """Whether `integers`, as made by `integer_weights(weights)`, keep the proportions without rounding."""
    exact = _fractions(weights)
    total, period = sum(exact), int(integers.sum())
    return all(f * period == int(n) * total for f, n in zip(exact, integers, strict=True))


def _fractions(weights: Sequence[SupportsFloat]) -> list[Fraction]:
    if not 1 <= len(weights) <= MAX_SOURCES:
        raise ValueError(f"dataset_weights: {len(weights)} weights, but 1 to {MAX_SOURCES} sources can be blended")
    exact = []
    for i, weight in enumerate(weights):
        if not (math.isfinite(float(weight)) and float(weight) >= 0):
            raise ValueError(f"dataset_weights[{i}] = {weight}: a weight must be a finite number, zero or more")
        exact.append(Fraction(weight) if isinstance(weight, int) else Fraction(repr(float(weight))))
    if not any(exact):
        raise ValueError(f"dataset_weights: all {len(exact)} weights are zero; at least one must be positive")
    return exact


def _largest_remainder(integers: list[int], total: int) -> list[int]:
    """Apportion `total` in the given proportions, at least 1 to each positive entry; ties go to the lower index."""
    result = [0] * len(integers)
    shared = [i for i, n in enumerate(integers) if n]
    while True:  # those below one unit get one; what is left is shared by the others, and again
        mass = sum(integers[i] for i in shared)
        small = [i for i in shared if integers[i] * total < mass]
        if not small:
            break
        for i in small:
            result[i] = 1
        total -= len(small)
        shared = [i for i in shared if integers[i] * (total + len(small)) >= mass]
    for i in shared:
        result[i] = integers[i] * total // mass
    missing = total - sum(result[i] for i in shared)
    for i in sorted(shared, key=lambda i: (-(integers[i] * total % mass), i))[:missing]:
        result[i] += 1
    return result


def _jobs(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source, release, deadline) of all draws, int64[W] each: a draw is made in one of the slots release..deadline."""
    W, M = int(weights.sum()), 2 * weights.size - 2
    source = np.repeat(np.arange(weights.size), weights)
    c = np.arange(W) - np.repeat(np.cumsum(weights) - weights, weights)
    den = M * weights[source]
    return source, -(-((c * M + 1) * W) // den), ((c * M + M - 1) * W) // den + 1


def _period_plain(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The twin of `compiled.blend_period()`: in each slot, the released draw with the smallest (deadline, source)."""
    W = int(weights.sum())
    source_of_job, release, deadline = _jobs(weights)
    by_deadline = np.argsort(deadline, kind="stable")  # jobs are listed by source, so ties fall to the lower source
    number = np.empty(W, np.int64)
    number[by_deadline] = np.arange(W)
    by_release = np.argsort(release, kind="stable")
    released = number[by_release].tolist()
    ends = np.searchsorted(release[by_release], np.arange(1, W + 1), side="right").tolist()
    ready: list[int] = []
    drawn = []
    at = 0
    for end in ends:
        for n in released[at:end]:
            heappush(ready, n)
        at = end
        drawn.append(heappop(ready))
    source = source_of_job[by_deadline[drawn]].astype(np.int16)
    return source, _ranks(source, weights)


def _ranks(source: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How often the same source was drawn before, within the period: int32[W]."""
    order = np.argsort(source, kind="stable")
    rank = np.empty(source.size, np.int32)
    rank[order] = np.arange(source.size) - np.repeat(np.cumsum(weights) - weights, weights)
    return rank


@dataclass(frozen=True)
class BlendTable:
    """One period of the draw order of k sources.

    weights: int64[k]; source: int16[W], the source of each draw; rank: int32[W], its earlier draws in the period.
    """

    weights: np.ndarray
    source: np.ndarray
    rank: np.ndarray

    @classmethod
    def build(cls, int_weights: Sequence[int] | np.ndarray) -> BlendTable:
        """Build the table for integer weights (see `integer_weights`); sources of weight zero are never drawn.

        Raises ValueError for weights that are negative, all zero, or too large for exact 64-bit arithmetic.
        """
        weights = np.asarray(int_weights, np.int64)
        if weights.ndim != 1 or not 1 <= weights.size <= MAX_SOURCES or weights.min() < 0 or not weights.any():
            raise ValueError(f"integer weights {int_weights}: 1 to {MAX_SOURCES} values >= 0, one of them positive")
        weights = weights // np.gcd.reduce(weights)
        live = np.flatnonzero(weights)
        period, k = int(weights.sum()), live.size
        if period > 1 << 24 or 2 * k * period**2 >= 1 << 63:
            raise ValueError(f"integer weights of {k} sources sum to {period}: reduce them with integer_weights()")
        if k == 1:
            source, rank = np.zeros(1, np.int16), np.zeros(1, np.int32)
        else:
            fast = compiled.blend_period() if period >= COMPILE_FROM else None
            source, rank = fast(weights[live], period) if fast else _period_plain(weights[live])
        return cls(weights, live.astype(np.int16)[source], rank)

    @classmethod
    def from_source(cls, int_weights: Sequence[int] | np.ndarray, source: np.ndarray) -> BlendTable:
        """The table from its broadcast parts; ValueError when `source` does not draw each source weight times."""
        weights = np.asarray(int_weights, np.int64)
        if source.dtype != np.int16 or not np.array_equal(np.bincount(source, minlength=weights.size), weights):
            raise ValueError("blend table: the received draw order does not match its weights")
        fast = compiled.ranks() if source.size >= COMPILE_FROM else None
        return cls(weights, source, fast(source, weights.size) if fast else _ranks(source, weights))

    @property
    def period(self) -> int:
        return self.source.size

    @cached_property
    def crc32(self) -> int:
        """CRC-32 of weights and draw order, little-endian: equal on every machine that draws the same."""
        return zlib.crc32(self.source.astype("<i2").tobytes(), zlib.crc32(self.weights.astype("<i8").tobytes()))

    @cached_property
    def _block(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whole periods, BLOCK draws or more: source int16[B], counter int[B], its growth a block int64[B]."""
        repeats = -(-BLOCK // self.period)
        if repeats == 1:
            return self.source, self.rank, self.weights[self.source]
        source = np.tile(self.source, repeats)
        growth = self.weights[source]
        counter = np.tile(self.rank, repeats) + growth * np.repeat(np.arange(repeats), self.period)
        return source, counter, growth * repeats

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws start..stop-1: their sources, int16[n], and how often each source was drawn before, int64[n]."""
        if not 0 <= start <= stop:
            raise ValueError(f"draws {start}..{stop}: the range must be increasing and not negative")
        block_source, block_counter, growth = self._block
        B, n = block_source.size, stop - start
        source, counter = np.empty(n, np.int16), np.empty(n, np.int64)
        done = 0
        while done < n:
            block, low = divmod(start + done, B)
            high = min(B, low + n - done)
            here = slice(done, done + high - low)
            source[here] = block_source[low:high]
            if high - low == B and done >= B:  # as one block earlier, one block further
                np.add(counter[done - B : done], growth, out=counter[here])
            else:
                np.multiply(growth[low:high], block, out=counter[here])
                counter[here] += block_counter[low:high]
            done += high - low
        return source, counter

    def expand(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The first n draws written out, as `draws(0, n)`: 10 bytes a draw; nothing in training needs this."""
        return self.draws(0, n)

    def counts_at(self, n: int) -> np.ndarray:
        """How often each source occurs in the first n draws: int64[k]."""
        periods, rest = divmod(n, self.period)
        return periods * self.weights + np.bincount(self.source[:rest], minlength=self.weights.size)
