"""What every sample order offers: which tokens of one source make up its c-th row, for any c, after any history.

An order belongs to one (source content, seed) and holds the sizes that are fixed for the whole run. A cursor is the
order as one stage reads it: it starts where earlier stages stopped and counts rows from 0. Two things are kept in a
checkpoint: `Order.settings()` and the visits, i.e. which stage lengths have consumed how many rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from megastage.data.doc_rule import DocRule

T = TypeVar("T")
Mark = Sequence[int]  # packed rows: block, rows of the stage before it; live text: see `LiveMark`


class Rows(NamedTuple):
    """n rows of p pieces: row r is made of pieces offsets[r] .. offsets[r+1]-1, in this order.

    offsets: int64[n+1]; starts: int64[p], the first token of each piece in the source's token stream;
    lengths: int64[p] > 0, its input tokens. The label of a piece's last token is the next token of the same document,
    if the document goes on there. Within an epoch every token is an input at most once.
    """

    offsets: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class Visit(NamedTuple):
    """One stage's use of a source: `rows` rows of `seq_len` tokens were consumed.

    mark: `Cursor.mark(rows)` of that stage, if it was kept; its place is then found without packing what lies before.
    rule: which documents it read, and in what shares; None: all alike.
    """

    seq_len: int
    rows: int
    mark: Sequence[int] | None = None
    rule: DocRule | None = None

    def same_rows(self, other: Visit) -> bool:
        """Whether the rows of both are cut and chosen alike, so that one goes on where the other stopped."""
        return (self.seq_len, self.rule) == (other.seq_len, other.rule)


class Cursor(Protocol):
    """One stage's rows of one source. Counters are rows since the stage's entry: int64, increasing, from 0."""

    skipped_tokens: int  # tokens of the current epoch given up by entering with this sequence length

    def rows(self, counters: np.ndarray) -> Rows:
        """The rows with these counters, in this order. There is no last row: epochs follow one another."""

    def epoch_at(self, counter: int) -> float:
        """Epochs of the source used up after `counter` rows of this stage (1.25: a quarter of the second one)."""

    def mark(self, consumed: int) -> Mark | None:
        """For `Visit.mark` and `Order.enter`: with it, going on after `consumed` rows, just read, needs no search."""


class Order(Protocol):
    """The sample order of one source under one seed. name: for messages."""

    name: str

    def enter(self, history: Sequence[Visit], seq_len: int, mark: Sequence[int] | None = None) -> Cursor:
        """The rows of a stage of length `seq_len` that follow `history`, what earlier stages consumed, in order.

        mark: a mark of this same stage, when a run goes on within it. Raises ValueError when `seq_len` is not possible.
        """

    def settings(self) -> dict[str, Any]:
        """JSON values that fix the order; given back at construction, they make the same order again."""

    def planned_epochs(self, history: Sequence[Visit]) -> float:
        """About how many epochs these visits use, without building anything: for plans."""


def check_seq_len(name: str, seq_len: int) -> int:
    """`seq_len` if it is a usable row length, else ValueError."""
    if seq_len < 1:
        raise ValueError(f"{name}: seq_len {seq_len}: a row needs at least one token")
    return seq_len


def saved(name: str, settings: Mapping[str, Any], kind: str, **facts: int) -> Mapping[str, Any]:
    """`settings`, checked to be of this kind and for this very source; ValueError names the difference."""
    for key, value in {"kind": kind, **facts}.items():
        if settings.get(key) != value:
            raise ValueError(
                f"{name}: the saved sample order has {key} = {settings.get(key)!r}, this run has {value!r}; "
                "the source or its settings have changed since the checkpoint was written"
            )
    return settings


def runs(history: Sequence[Visit], seq_len: int, rule: DocRule | None = None) -> tuple[list[Visit], Visit]:
    """`history` with adjacent visits of one length and rule joined: (those before, the one that the new stage goes on
    with).

    A stage of the same length and rule as the last one goes on with its rows as if nothing had changed; for any other
    the second result is a visit of no rows.
    """
    new = Visit(seq_len, 0, None, rule)
    joined: list[Visit] = []
    for visit in history:
        if not visit.rows:
            continue
        if joined and joined[-1].same_rows(visit):
            last = joined.pop()
            visit = visit._replace(rows=last.rows + visit.rows, mark=visit.mark or last.mark)
        joined.append(visit)
    if joined and joined[-1].same_rows(new):
        return joined[:-1], joined[-1]
    return joined, new


class Recent:
    """Keeps the results made last, by key."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value kept under `key`, or a new one from `make()`."""
        if key in self._kept:
            return self._kept[key]
        value = make()
        self._kept[key] = value
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return value


def ragged_index(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers first[i] .. first[i]+count[i]-1 for every i in turn, and their i: two int64[sum(count)]."""
    ends = np.cumsum(count)
    owner = np.repeat(np.arange(count.size), count)
    return np.arange(int(count.sum())) + np.repeat(first - (ends - count), count), owner


def make_order(
    kind: str,
    *,
    seed: int,
    fingerprint: bytes,
    lengths: Sequence[int],
    n_tokens: int | None = None,
    doc_ends: np.ndarray | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str = "source",
    superblock: int | None = None,
    rules: Sequence[DocRule] = (),
) -> Order:
    """An order for a source that will be read in rows of the given lengths.

    kind: "lanes" (a token stream; needs n_tokens), "packed" (documents packed into rows) or "streams" (documents in
    the given order, as for text read on the fly); the last two need doc_ends, the cumulative ends of the documents.
    settings: from a checkpoint; they decide the sizes, and `lengths` is then not used. name: for messages.
    superblock: tokens of a shuffled block of lanes; None: chosen. rules: under which packed documents will be read.
    """
    from megastage.data.lanes import LaneOrder
    from megastage.data.packing import PackedOrder
    from megastage.data.streams import StreamOrder

    if kind == "lanes":
        assert n_tokens is not None
        return LaneOrder.make(n_tokens, lengths, seed, fingerprint, settings, name, superblock)
    assert doc_ends is not None
    if kind == "packed":
        return PackedOrder.make(doc_ends, lengths, seed, fingerprint, settings, name, rules)
    if kind == "streams":
        return StreamOrder.make(doc_ends, settings, name)
    raise ValueError(f"sample order {kind!r}: known are lanes, packed, streams")
