"""A whole run's order: six stages of changing mixtures and lengths over five sources, cut, resumed, sliced, edited."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from megastage.data.blend import BlendTable, integer_weights
from megastage.data.order import Visit, make_order
from megastage.data.packing import PackedOrder

STAGES = [  # (row length, weights, rows)
    (64, [0.5, 0.2, 0.2, 0.1, 0.0], 900),
    (512, [0.1, 0.1, 0.3, 0.3, 0.2], 130),
    (94, [0.3, 0.3, 0.2, 0.1, 0.1], 700),
    (94, [0.05, 0.05, 0.1, 0.3, 0.5], 650),
    (128, [1, 0, 0, 0, 2], 400),
    (37, [0.2, 0.2, 0.2, 0.2, 0.2], 2500),
]
SIZES = [9000, 12_345, 4096, 20_000, 7777]


class Run:
    """Blend and orders as a data engine uses them; its state is the settings and the rows consumed per stage."""

    def __init__(self, kind: str, stages=STAGES, state: dict | None = None) -> None:
        self.stages, self.state = stages, state or {"stage": 0, "row": 0, "visits": [[] for _ in SIZES], "orders": None}
        self.orders = []
        for i, n_tokens in enumerate(SIZES):
            lengths = np.maximum(1, np.random.default_rng(i).lognormal(3.5, 1, n_tokens // 40).astype(np.int64))
            doc_ends = np.minimum(np.cumsum(lengths), n_tokens)
            doc_ends[-1] = n_tokens
            self.orders.append(
                make_order(
                    kind,
                    seed=11,
                    fingerprint=bytes([i]) * 32,
                    lengths=[length for length, _, _ in stages],
                    n_tokens=n_tokens,
                    doc_ends=doc_ends,
                    settings=self.state["orders"][i] if self.state["orders"] else None,
                    name=f"source {i}",
                )
            )
        self.state["orders"] = [order.settings() for order in self.orders]
        self._enter()

    def _enter(self) -> None:
        self.seq_len, weights, self.n_rows = self.stages[self.state["stage"]]
        self.table = BlendTable.build(integer_weights(weights))
        histories = [[Visit(*visit) for visit in visits] for visits in self.state["visits"]]
        self.cursors = [order.enter(visits, self.seq_len) for order, visits in zip(self.orders, histories)]

    def ids(self, start: int, stop: int) -> list[tuple]:
        """(source, pieces) of rows start..stop-1 of this stage."""
        source, counter = self.table.draws(start, stop)
        result: list[tuple] = [()] * (stop - start)
        for i in np.unique(source):
            at = np.flatnonzero(source == i)
            rows = self.cursors[i].rows(counter[at])
            for row, a, b in zip(at.tolist(), rows.offsets[:-1].tolist(), rows.offsets[1:].tolist()):
                result[row] = (int(i), tuple(rows.starts[a:b].tolist()), tuple(rows.lengths[a:b].tolist()))
        return result

    def next(self, batch: int) -> list[tuple]:
        """The next rows, up to the end of the stage."""
        start = self.state["row"]
        stop = min(start + batch, self.n_rows)
        got = self.ids(start, stop)
        self.state["row"] = stop
        if stop == self.n_rows:
            counts = self.table.counts_at(stop).tolist()
            for visits, rows in zip(self.state["visits"], counts):
                visits.append([self.seq_len, rows])
            self.state.update(stage=self.state["stage"] + 1, row=0)
            if self.state["stage"] < len(self.stages):
                self._enter()
        return got

    def rest(self, batch: int) -> list[tuple]:
        got: list[tuple] = []
        while self.state["stage"] < len(self.stages):
            got += self.next(batch)
        return got


@pytest.fixture(scope="module", params=["lanes", "packed", "streams"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def whole(kind):
    return Run(kind).rest(24)


def test_every_token_is_counted(kind, whole):
    """No token is read again before the source's epoch is over; packing reads each exactly as often as the others."""
    if kind == "streams":
        pytest.skip("each stream has epochs of its own; test_order_streams.py follows them token by token")
    stage_of = np.repeat(np.arange(len(STAGES)), [rows for _, _, rows in STAGES])
    counts = [np.zeros(n, np.int64) for n in SIZES]
    for stage, (i, starts, lengths) in zip(stage_of.tolist(), whole):
        assert sum(lengths) <= STAGES[stage][0]
        for start, length in zip(starts, lengths):
            counts[i][start : start + length] += 1
    run = Run(kind)
    run.rest(1000)
    for i, count in enumerate(counts):
        epochs = run.orders[i].enter([Visit(*visit) for visit in run.state["visits"][i]], 37).epoch_at(0)
        assert epochs > 1.5  # each source wraps
        assert count.max() <= np.ceil(epochs)
        if kind == "packed":
            assert count.min() == int(count.sum()) // SIZES[i] >= count.max() - 1


def test_batch_size_and_ranks_do_not_matter(kind, whole):
    assert Run(kind).rest(7) == whole
    run = Run(kind)
    assert [row for r in range(3) for row in run.ids(96 + 8 * r, 104 + 8 * r)] == whole[96:120]


@pytest.mark.parametrize("cut", [1, 10, 39, 60, 99])
def test_a_resumed_run_is_the_uncut_one(kind, whole, cut):
    run, got = Run(kind), []
    for _ in range(cut):
        got += run.next(24)
    state = json.loads(json.dumps(run.state))
    assert got + Run(kind, state=state).rest(31) == whole


def test_editing_later_stages_leaves_earlier_rows_alone(kind, whole):
    first = Run(kind)
    while first.state["stage"] < 3:
        first.next(24)
    edited = [*STAGES[:3], (94, [0.5, 0.5, 0, 0, 0], 77), (200, [1, 1, 1, 1, 1], 300)]
    start = {"stage": 0, "row": 0, "visits": [[] for _ in SIZES], "orders": first.state["orders"]}
    rows = sum(n for _, _, n in STAGES[:3])
    assert Run(kind, edited, start).rest(24)[:rows] == whole[:rows]


def test_run_is_the_one_of_all_releases(kind, whole):
    assert hashlib.sha256(repr(whole).encode()).hexdigest()[:16] == GOLDEN[kind]


GOLDEN = {"lanes": "a6058a2edb324720", "packed": "67be7b2410164e00", "streams": "c25fc61ce451dd4a"}


def test_a_mark_makes_what_lies_before_it_needless():
    """A chain of stages entered with marks reads the same rows as one found by packing everything."""
    lengths = np.random.default_rng(5).integers(1, 300, 900)
    order = PackedOrder(np.cumsum(lengths), block_documents=100, seed=3, fingerprint=b"f")
    plain, marked = [], []
    for seq_len, rows in ((64, 900), (512, 70), (94, 300), (128, 2)):
        cursor = order.enter(plain, seq_len)
        cursor.rows(np.arange(rows))
        plain.append(Visit(seq_len, rows))
        marked.append(Visit(seq_len, rows, cursor.mark(rows)))
    assert [visit.mark is None for visit in marked] == [False, False, False, True]
    one, two = order.enter(plain, 77).rows(np.arange(200)), order.enter(marked, 77).rows(np.arange(200))
    assert all(np.array_equal(a, b) for a, b in zip(one, two))
