"""The order of a token stream: permuted superblocks, read side by side in lanes, so that any later length can go on.

The stream is cut into N superblocks of S tokens, permuted anew in each epoch. A group of about G of them is read at a
time, one window of each in turn. Inside a superblock windows are read in order, so after any number of rows the unread
part of each lane is one contiguous tail, which a stage of another length reads first. All positions are closed forms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megastage.data.order import Recent, Rows, Visit, check_seq_len, ragged_index, runs, saved
from megastage.data.permutation import Permutation, derive_key

MAX_LANES = 1024
MAX_UNREAD = 0.01  # of an epoch, that a superblock size may leave unread at its end
MIN_SUPERBLOCKS = 8  # a small source is not cut coarser than this for the sake of MAX_UNREAD
MAX_MULTIPLE = 64


def choose_superblock(lengths: Sequence[int], n_tokens: int, name: str = "source") -> int:
    """Tokens per superblock for a source of `n_tokens` tokens that will be read at all these lengths.

    The smallest multiple of the longest length that leaves at most 1 % of an epoch unread at each length; for a small
    source, which should still have eight superblocks, the one that leaves least.
    Raises ValueError when the source has not enough tokens for one row of the longest length.
    """
    longest = max(check_seq_len(name, length) for length in lengths)
    usable = n_tokens - 1  # the last token is only ever a label
    if usable < longest:
        raise ValueError(
            f"{name}: {n_tokens} tokens are too few for one row of seq_len {longest}, which reads {longest + 1} "
            "(its last label included); use more data or a shorter seq_len"
        )
    best, least = longest, 2.0
    for multiple in range(1, min(MAX_MULTIPLE, max(1, usable // (MIN_SUPERBLOCKS * longest))) + 1):
        size = multiple * longest
        unread = max(1 - (usable // size) * (size // length) * length / usable for length in lengths)
        if unread < least - 1e-12:
            best, least = size, unread
        if unread <= MAX_UNREAD:
            break
    return best


def choose_lanes(n_tokens: int, superblock: int) -> int:
    """Superblocks read side by side: the square root of their number, at most 1024, bounds the loss at a boundary."""
    n = (n_tokens - 1) // superblock
    return min(MAX_LANES, math.isqrt(max(n, 1) - 1) + 1)


@dataclass(frozen=True)
class _Frontier:
    """Where reading stopped: groups before `group` are done, of its lanes the first `read` tokens (int64[lanes])."""

    epoch: int
    group: int
    read: np.ndarray


class LaneOrder:
    """The sample order of a stream of `n_tokens` tokens. superblock, lanes: fixed for the whole run."""

    def __init__(
        self, n_tokens: int, *, superblock: int, lanes: int, seed: int, fingerprint: bytes, name: str = "source"
    ) -> None:
        self.n_tokens, self.superblock, self.lanes, self.name = n_tokens, superblock, lanes, name
        self.seed, self.fingerprint = seed, fingerprint
        self.n_superblocks = (n_tokens - 1) // superblock
        if self.n_superblocks < 1 or lanes < 1:
            raise ValueError(
                f"{name}: {n_tokens} tokens hold no superblock of {superblock} tokens and one label ({lanes} lanes)"
            )
        self.n_groups = -(-self.n_superblocks // lanes)
        self._epochs, self._groups = Recent(4), Recent(16)

    @classmethod
    def make(
        cls,
        n_tokens: int,
        lengths: Sequence[int],
        seed: int,
        fingerprint: bytes,
        settings: Mapping[str, Any] | None = None,
        name: str = "source",
        superblock: int | None = None,
    ) -> LaneOrder:
        """With sizes for these lengths, or those of saved `settings`. superblock: its tokens; None: chosen."""
        if superblock is not None and superblock < max(lengths):
            raise ValueError(
                f"training.superblock_tokens = {superblock}: {name} is read in rows of seq_len {max(lengths)}, which "
                "must fit; raise it, or leave it out"
            )
        if settings is not None and superblock not in (None, settings.get("superblock")):
            raise ValueError(
                f"training.superblock_tokens = {superblock}: the order of {name} was made with "
                f"{settings.get('superblock')}; set it back, or leave it out"
            )
        if settings is None:
            superblock = choose_superblock(lengths, n_tokens, name) if superblock is None else superblock
            lanes = choose_lanes(n_tokens, superblock)
        else:
            saved(name, settings, "lanes", n_tokens=n_tokens, seed=seed)
            superblock, lanes = settings["superblock"], settings["lanes"]
        return cls(n_tokens, superblock=superblock, lanes=lanes, seed=seed, fingerprint=fingerprint, name=name)

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "lanes",
            "n_tokens": self.n_tokens,
            "seed": self.seed,
            "superblock": self.superblock,
            "lanes": self.lanes,
        }

    def enter(self, history: Sequence[Visit], seq_len: int, mark: Sequence[int] | None = None) -> LaneCursor:
        """See `Order.enter`; marks are not needed here."""
        front: _Frontier | None = None
        before, current = runs(history, seq_len)
        for visit in before:
            front = LaneCursor(self, front, visit.seq_len).frontier(visit.rows)
        return LaneCursor(self, front, seq_len, current.rows)

    def planned_epochs(self, history: Sequence[Visit]) -> float:
        return sum(v.rows / (self.n_superblocks * (self.superblock // v.seq_len)) for v in history)

    def unread_tokens(self, seq_len: int) -> int:
        """Tokens that no row of an epoch reads when all of it is read at this length; others in each epoch."""
        return self.n_tokens - 1 - self.n_superblocks * (self.superblock // seq_len) * seq_len

    def group_start(self, group: np.ndarray | int) -> Any:
        """First superblock (in reading order) of a group; groups differ by one superblock at most."""
        return group * self.n_superblocks // self.n_groups

    def lane_starts(self, epoch: int, group: int) -> np.ndarray:
        """First token of every lane of a group: int64[lanes of the group]."""
        return self._groups.get((epoch, group), lambda: self._make_lane_starts(epoch, group))

    def _make_lane_starts(self, epoch: int, group: int) -> np.ndarray:
        permutation, phase = self._epochs.get(epoch, lambda: self._make_epoch(epoch))
        turn = np.arange(self.group_start(group), self.group_start(group + 1))
        return phase + self.superblock * permutation(turn)

    def _make_epoch(self, epoch: int) -> tuple[Permutation, int]:
        """The superblocks' order, and where the first one begins: what an epoch cannot reach differs each time."""
        key = derive_key(self.seed, self.fingerprint, epoch, "superblocks")
        slack = self.n_tokens - 1 - self.n_superblocks * self.superblock
        phase = derive_key(self.seed, self.fingerprint, epoch, "phase") % (slack + 1)
        return Permutation(self.n_superblocks, key), phase


class LaneCursor:
    """A stage's rows: first the windows that fit in the open group's tails, then whole groups, epoch after epoch.

    The windows of the whole infinite order at this length are numbered; `_first` is the number of the first one after
    the tails. Window x of an epoch is in superblock x div q (in reading order), q windows per superblock.
    consumed: rows of this length that earlier stages have read from here.
    """

    def __init__(self, order: LaneOrder, front: _Frontier | None, seq_len: int, consumed: int = 0) -> None:
        self._order, self._front, self._consumed = order, front, consumed
        self._length = check_seq_len(order.name, seq_len)
        if seq_len > order.superblock:
            raise ValueError(
                f"{order.name}: seq_len {seq_len} does not fit the superblocks of {order.superblock} tokens that were "
                "fixed when this source was first read; give the stage a new dataset_random_seed to start it afresh"
            )
        self._windows = order.superblock // seq_len  # q
        self._tail_lane = self._tail_read = np.empty(0, np.int64)
        self._first = 0
        self.skipped_tokens = 0
        if front is not None:
            unread = order.superblock - front.read
            self.skipped_tokens = 0 if consumed else int((unread % seq_len).sum())
            turn, lane = ragged_index(np.zeros(unread.size, np.int64), unread // seq_len)
            by_turn = np.lexsort((lane, front.read[lane], turn))  # lanes take turns, the least-read first
            self._tail_lane = lane[by_turn]
            self._tail_read = (front.read[lane] + turn * seq_len)[by_turn]
            superblocks = front.epoch * order.n_superblocks + order.group_start(front.group + 1)
            self._first = superblocks * self._windows

    def _locate(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(epoch, group, round, lane) of windows x of the infinite order, int64[n] each."""
        order, q = self._order, self._windows
        N, ng = order.n_superblocks, order.n_groups
        epoch, x = np.divmod(x, N * q)
        group = ((x // q + 1) * ng - 1) // N
        start = order.group_start(group)
        turn, lane = np.divmod(x - start * q, order.group_start(group + 1) - start)
        return epoch, group, turn, lane

    def rows(self, counters: np.ndarray) -> Rows:
        """See `Cursor.rows`: each row is one piece of seq_len tokens. Any access pattern is served."""
        counters = np.asarray(counters, np.int64) + self._consumed
        order, n_tail = self._order, self._tail_lane.size
        starts = np.empty(counters.size, np.int64)
        in_tail = counters < n_tail
        if self._front is not None and in_tail.any():
            at = counters[in_tail]
            base = order.lane_starts(self._front.epoch, self._front.group)
            starts[in_tail] = base[self._tail_lane[at]] + self._tail_read[at]
        later = np.flatnonzero(~in_tail)
        epoch, group, turn, lane = self._locate(counters[later] - n_tail + self._first)
        changes = np.flatnonzero((np.diff(epoch) != 0) | (np.diff(group) != 0)) + 1
        bounds = [0, *changes.tolist(), later.size] if later.size else [0]
        for low, high in pairwise(bounds):
            base = order.lane_starts(int(epoch[low]), int(group[low]))
            starts[later[low:high]] = base[lane[low:high]] + turn[low:high] * self._length
        lengths = np.full(counters.size, self._length, np.int64)
        return Rows(np.arange(counters.size + 1), starts, lengths)

    def epoch_at(self, counter: int) -> float:
        """See `Cursor.epoch_at`: by the tokens read; what is given up counts when the group is done."""
        front = self.frontier(counter)
        if front is None:
            return 0.0
        done = self._order.group_start(front.group) + int(front.read.sum()) / self._order.superblock
        return float(front.epoch + done / self._order.n_superblocks)

    def mark(self, consumed: int) -> None:
        """Nothing is needed: positions are closed forms."""
        return None

    def frontier(self, rows: int) -> _Frontier | None:
        """Where a stage of another length begins when this one consumed `rows` rows."""
        rows += self._consumed
        if rows == 0:
            return self._front
        n_tail = self._tail_lane.size
        if self._front is not None and rows <= n_tail:
            taken = np.bincount(self._tail_lane[:rows], minlength=self._front.read.size)
            return _Frontier(self._front.epoch, self._front.group, self._front.read + taken * self._length)
        last = np.array([rows - 1 - n_tail + self._first])
        epoch, group, turn, lane = (int(v[0]) for v in self._locate(last))
        lanes = np.arange(self._order.group_start(group + 1) - self._order.group_start(group))
        return _Frontier(epoch, group, (turn + (lanes <= lane)) * self._length)
