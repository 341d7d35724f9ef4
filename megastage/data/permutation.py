"""Permutations of [0, n) computed at a point: no table for large n, the same on every platform and numpy version.

Large n: an alternating Feistel network on an a x b grid just larger than n, with cycle walking (Black & Rogaway,
"Ciphers with arbitrary finite domains", 2002). Small n: a sort by keyed hash, which reaches every order evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

SMALL = 1 << 16  # up to here the permutation is a sorted table; part of the saved order, never to be changed
HALF_ROUNDS = 8
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # splitmix64's increment
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64's multipliers


def _mix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX[0]) & _MASK
    z = ((z ^ (z >> 27)) * _MIX[1]) & _MASK
    return z ^ (z >> 31)


def _mix64_array(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX[0])
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX[1])
    return z ^ (z >> np.uint64(31))


def derive_key(seed: int, fingerprint: bytes, epoch: int, purpose: str) -> int:
    """A 64-bit key for one use of one source in one epoch: a splitmix64 chain over all four arguments."""
    words = [seed & _MASK, epoch & _MASK]
    for text in (fingerprint, purpose.encode()):
        words.append(len(text))
        words += [int.from_bytes(text[i : i + 8], "little") for i in range(0, len(text), 8)]
    state = 0
    for word in words:
        state = _mix64(((state + _GAMMA) & _MASK) ^ word)
    return state


class Permutation:
    """A permutation of [0, n), 1 <= n < 2^62, chosen by a 64-bit key. Maps int64 arrays of any shape to int64.

    half_rounds is for tests only: fewer than four are measurably not random.
    """

    def __init__(self, n: int, key: int, *, half_rounds: int = HALF_ROUNDS) -> None:
        if not 1 <= n < 1 << 62:
            raise ValueError(f"a permutation of {n} elements: the size must be at least 1 and below 2^62")
        self.n = n
        self._table: np.ndarray | None = None
        self._inverse_table: np.ndarray | None = None
        if n <= SMALL:
            index = _mix64_array(np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GAMMA))
            # hashes are one to one, so that no ties depend on the way of sorting
            self._table = np.argsort(_mix64_array(index ^ np.uint64(key))).astype(np.int64)
            return
        a = math.isqrt(n - 1) + 1
        self._a, self._b = np.uint64(a), np.uint64(-(-n // a))
        self._keys = [np.uint32(_mix64((key + (j + 1) * _GAMMA) & _MASK) >> 32) for j in range(half_rounds)]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Where the elements x go. Raises ValueError outside [0, n)."""
        x = self._checked(x)
        if self._table is not None:
            return self._table[x]
        return self._walk(x, self._forward)

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """Which elements go to y. Raises ValueError outside [0, n)."""
        y = self._checked(y)
        if self._table is None:
            return self._walk(y, self._backward)
        if self._inverse_table is None:
            self._inverse_table = np.empty(self.n, np.int64)
            self._inverse_table[self._table] = np.arange(self.n)
        return self._inverse_table[y]

    def _checked(self, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, np.int64)
        if x.size and not (x.min() >= 0 and x.max() < self.n):
            raise ValueError(f"permutation of {self.n} elements: asked for {x.min()}..{x.max()}")
        return x

    def _walk(self, x: np.ndarray, step: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Apply `step` on the grid until every element is back below n."""
        shape = x.shape
        out = step(x.reshape(-1).astype(np.uint64))
        outside = np.flatnonzero(out >= np.uint64(self.n))
        while outside.size:
            moved = step(out[outside])
            out[outside] = moved
            outside = outside[moved >= np.uint64(self.n)]
        return out.astype(np.int64).reshape(shape)

    def _forward(self, x: np.ndarray) -> np.ndarray:
        left = x // self._b
        right = x - left * self._b
        for j, key in enumerate(self._keys):
            half, other, size = (left, right, self._a) if j % 2 == 0 else (right, left, self._b)
            half += _hash_below(other, key, size)
            half -= size * (half >= size)
        return left * self._b + right

    def _backward(self, x: np.ndarray) -> np.ndarray:
        left = x // self._b
        right = x - left * self._b
        for j in range(len(self._keys) - 1, -1, -1):
            half, other, size = (left, right, self._a) if j % 2 == 0 else (right, left, self._b)
            half += size - _hash_below(other, self._keys[j], size)
            half -= size * (half >= size)
        return left * self._b + right


def _hash_below(x: np.ndarray, key: np.uint32, size: np.uint64) -> np.ndarray:
    """murmur3's 32-bit finaliser of x ^ key, scaled to [0, size). x uint64[n] below 2^32, returns uint64[n]."""
    h = x.astype(np.uint32)
    h ^= key
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    out = h.astype(np.uint64)
    out *= size
    out >>= np.uint64(32)
    return out
