"""Inner loops that numba may speed up. Each has a plain-Python twin with the same result beside its caller.

numba is optional: `blend_period()`, `best_fit()` and those of `compiled_rows` are None where numba is missing or
switched off with the environment variable MEGASTAGE_NUMBA=0.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

# The position of the single set bit of x is DE_BRUIJN[(x * DE_BRUIJN_FACTOR) >> 58] (a de Bruijn sequence of order 6).
DE_BRUIJN_FACTOR = 0x03F79D71B4CB0A89
DE_BRUIJN = np.zeros(64, np.int64)
for _bit in range(64):
    DE_BRUIJN[((DE_BRUIJN_FACTOR << _bit) & 0xFFFF_FFFF_FFFF_FFFF) >> 58] = _bit


@lru_cache(maxsize=1)
def _numba() -> Any:
    if os.environ.get("MEGASTAGE_NUMBA", "1") == "0":
        return None
    try:
        import numba
    except ImportError:
        return None
    return numba


def available() -> bool:
    """Whether loops can be compiled. Imports numba."""
    return _numba() is not None


def compile_loop(function: Callable[..., Any], *, nogil: bool = False) -> Callable[..., Any] | None:
    """`function` compiled at its first call (and cached on disk), or None without numba."""
    numba = _numba()
    if numba is None:
        return None
    try:
        return numba.njit(cache=True, nogil=nogil)(function)
    except RuntimeError:  # no writable place for the cache
        return numba.njit(nogil=nogil)(function)


@lru_cache(maxsize=1)
def blend_period() -> Callable[..., Any] | None:
    """Compiled `(weights int64[k], period) -> (source int16[W], rank int32[W])`, k >= 2, or None."""
    release_order, sweep = (compile_loop(function, nogil=True) for function in (_release_order, _sweep))
    if release_order is None or sweep is None:
        return None

    def blend_period(weights: np.ndarray, period: int) -> tuple[np.ndarray, np.ndarray]:
        return sweep(weights.size, *release_order(weights, period))

    return blend_period


@lru_cache(maxsize=1)
def ranks() -> Callable[..., Any] | None:
    """Compiled `(source int16[n], k) -> int32[n]`, how often the same source came before, or None."""
    return compile_loop(_ranks)


@lru_cache(maxsize=1)
def best_fit() -> Callable[..., Any] | None:
    """Compiled `(lengths int64[n] in falling order, capacity) -> bin int64[n]`, or None."""
    return compile_loop(_best_fit)


def _ranks(source: np.ndarray, k: int) -> np.ndarray:
    seen = np.zeros(k, np.int32)
    rank = np.empty(source.size, np.int32)
    for n in range(source.size):
        i = source[n]
        rank[n] = seen[i]
        seen[i] += 1
    return rank


def _release_order(weights: np.ndarray, period: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All draws of one period, numbered by (deadline, source), and sorted by the slot from which they may happen.

    Returns the source of each number, int16[W]; the numbers slot by slot, int32[W]; and where each slot's end there,
    by slot from 1, int32[W+2]. Two counting sorts, deadlines and releases kept as quotient and remainder.
    """
    k, W = weights.size, period
    M = 2 * k - 2
    releases = np.empty(W, np.int32)
    deadlines = np.empty(W, np.int32)
    by_deadline = np.zeros(W + 2, np.int32)
    by_release = np.zeros(W + 2, np.int32)
    job = 0
    for i in range(k):
        den = M * weights[i]
        step, step_rest = W // weights[i], (W % weights[i]) * M
        release, release_rest = (W + den - 1) // den, (W + den - 1) % den
        deadline, deadline_rest = ((M - 1) * W) // den, ((M - 1) * W) % den
        for _ in range(weights[i]):
            releases[job] = release
            deadlines[job] = deadline + 1
            by_release[release + 1] += 1
            by_deadline[deadline + 2] += 1
            release_rest += step_rest
            carry = np.int64(release_rest >= den)  # without a branch, which would be taken at random
            release, release_rest = release + step + carry, release_rest - carry * den
            deadline_rest += step_rest
            carry = np.int64(deadline_rest >= den)
            deadline, deadline_rest = deadline + step + carry, deadline_rest - carry * den
            job += 1
    for slot in range(W + 1):
        by_release[slot + 1] += by_release[slot]
        by_deadline[slot + 1] += by_deadline[slot]
    source_of = np.empty(W, np.int16)
    released = np.empty(W, np.int32)
    job = 0
    for i in range(k):
        for _ in range(weights[i]):
            number = by_deadline[deadlines[job]]
            by_deadline[deadlines[job]] += 1
            source_of[number] = i
            released[by_release[releases[job]]] = number
            by_release[releases[job]] += 1
            job += 1
    return source_of, released, by_release  # what were starts are now ends


def _sweep(k: int, source_of: np.ndarray, released: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Earliest deadline first, in O(1) a draw: (source int16[W], rank int32[W]).

    The draws that may happen are a bitmap over their numbers, whose lowest bit is the draw to make; two summary levels
    above it make a long search a matter of three words.
    """
    W = source_of.size
    zero, one, factor = np.uint64(0), np.uint64(1), np.uint64(DE_BRUIJN_FACTOR)
    words = np.zeros(W // 64 + 1, np.uint64)
    summary = np.zeros(words.size // 64 + 1, np.uint64)
    top = np.zeros(summary.size // 64 + 1, np.uint64)
    source = np.empty(W, np.int16)
    rank = np.empty(W, np.int32)
    drawn = np.zeros(k, np.int32)
    at = low = 0  # low: no bit is set in a lower word
    for slot in range(1, W + 1):
        while at < ends[slot]:
            number = released[at]
            low = min(low, number >> 6)
            words[number >> 6] |= one << np.uint64(number & 63)
            summary[number >> 12] |= one << np.uint64((number >> 6) & 63)
            top[number >> 18] |= one << np.uint64((number >> 12) & 63)
            at += 1
        if words[low] == zero:  # the lowest set bit is far away: look it up
            high = 0
            while top[high] == zero:
                high += 1
            bits = top[high]
            mid = (high << 6) | DE_BRUIJN[np.int64(((bits & (~bits + one)) * factor) >> np.uint64(58))]
            bits = summary[mid]
            low = (mid << 6) | DE_BRUIJN[np.int64(((bits & (~bits + one)) * factor) >> np.uint64(58))]
        bits = words[low]
        number = (low << 6) | DE_BRUIJN[np.int64(((bits & (~bits + one)) * factor) >> np.uint64(58))]
        bits &= bits - one
        words[low] = bits
        if bits == zero:
            mid = low >> 6
            summary[mid] &= ~(one << np.uint64(low & 63))
            if summary[mid] == zero:
                top[mid >> 6] &= ~(one << np.uint64(mid & 63))
        i = source_of[number]
        source[slot - 1] = i
        rank[slot - 1] = drawn[i]
        drawn[i] += 1
    return source, rank


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Each item goes to the fullest bin that still holds it; among equally full ones, to the one filled last."""
    n = lengths.size
    bins = np.empty(n, np.int64)
    room_top = np.full(capacity + 1, -1, np.int64)  # by free room: the bin filled last
    below = np.empty(n, np.int64)  # by bin: the bin with the same room filled before it
    words = np.zeros(capacity // 64 + 1, np.uint64)  # which free rooms have a bin
    summary = np.zeros(words.size // 64 + 1, np.uint64)  # which words are not zero
    zero, one, factor = np.uint64(0), np.uint64(1), np.uint64(DE_BRUIJN_FACTOR)
    opened = 0
    for item in range(n):
        length = lengths[item]
        word = length >> 6
        bits = words[word] & ((~zero) << np.uint64(length & 63))
        if bits == zero:  # the next word that has any
            high = (word + 1) >> 6
            some = summary[high] & ((~zero) << np.uint64((word + 1) & 63))
            while some == zero and high + 1 < summary.size:
                high += 1
                some = summary[high]
            if some != zero:
                word = (high << 6) | DE_BRUIJN[np.int64(((some & (~some + one)) * factor) >> np.uint64(58))]
                bits = words[word]
        if bits == zero:
            room, target = capacity, opened
            opened += 1
        else:
            room = (word << 6) | DE_BRUIJN[np.int64(((bits & (~bits + one)) * factor) >> np.uint64(58))]
            target = room_top[room]
            room_top[room] = below[target]
            if room_top[room] < 0:
                words[word] &= ~(one << np.uint64(room & 63))
                if words[word] == zero:
                    summary[word >> 6] &= ~(one << np.uint64(word & 63))
        bins[item] = target
        room -= length
        below[target] = room_top[room]
        room_top[room] = target
        words[room >> 6] |= one << np.uint64(room & 63)
        summary[room >> 12] |= one << np.uint64((room >> 6) & 63)
    return bins
