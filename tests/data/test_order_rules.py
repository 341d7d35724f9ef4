"""Rules on the length of documents: who is read, in which shares, never twice, whatever the history and the access."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megastage.data import compiled, doc_rule, packing
from megastage.data.doc_rule import DocRule, Survey
from megastage.data.order import Visit, make_order
from megastage.data.packing import PackedOrder, check_rule, choose_block

SHARES = (0.75, 0.25, 1 / 3, 0.9, 0.5, 0.0, 1.0)


def order(lengths, block: int = 16, seed: int = 1) -> PackedOrder:
    return PackedOrder(np.cumsum(lengths), block_documents=block, seed=seed, fingerprint=b"docs" * 8, name="/books")


def lengths_of(seed: int, count: int, mean: float = 60) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.maximum(1, rng.lognormal(np.log(mean), 1.2, count)).astype(np.int64)


class Audit:
    """Follows a source through stages token by token; what a row may hold is judged from the documents' lengths."""

    def __init__(self, lengths, source: PackedOrder) -> None:
        self.lengths, self.source = np.asarray(lengths), source
        self.ends = np.cumsum(self.lengths)
        self.read: dict[int, np.ndarray] = {}  # by epoch: how often each token was an input
        self.last: dict[int, list[DocRule | None]] = {}  # by block: the rules it was read under
        self.kinds: dict[int, Counter] = {}  # by block: rows of long and of short documents
        self.block = 0

    def stage(self, history: list[Visit], seq_len: int, rows: int, rule: DocRule | None) -> None:
        cursor = self.source.enter(history, seq_len, None, rule)
        got = cursor.rows(np.arange(rows))
        documents = np.searchsorted(self.ends, got.starts, side="right")
        if rows and self.block in self.last:
            self.last[self.block].append(rule)  # it takes over the open block, if only to find no row there
        assert (got.starts + got.lengths <= self.ends[documents]).all()
        for row, (first, stop) in enumerate(pairwise(got.offsets.tolist())):
            assert 0 < int(got.lengths[first:stop].sum()) <= seq_len
            mark = cursor.mark(row + 1)
            assert mark is None or mark[0] >= self.block
            self.block = self.block if mark is None else mark[0]
            kind = self.judge(self.lengths[documents[first:stop]], rule)
            self.kinds.setdefault(self.block, Counter())[kind] += 1
            epoch = self.read.setdefault(self.block // self.source.n_blocks, np.zeros(int(self.ends[-1]), np.int64))
            for start, length in zip(got.starts[first:stop].tolist(), got.lengths[first:stop].tolist()):
                epoch[start : start + length] += 1
            if rule not in (under := self.last.setdefault(self.block, [])):
                under.append(rule)
        assert all(count.max() <= 1 for count in self.read.values())  # no token twice in an epoch

    @staticmethod
    def judge(lengths: np.ndarray, rule: DocRule | None) -> str:
        if rule is None:
            return "any"
        assert lengths.min() >= rule.min_doc_len
        if rule.long_doc_share is None:
            return "any"
        long = lengths >= rule.long_doc_len
        assert long.all() or not long.any()
        return "long" if long[0] else "short"

    def conclude(self) -> None:
        """Blocks that reading has passed: what their last rule wants was read, but for the surplus of one kind."""
        for block, rules in self.last.items():
            if block >= self.block:
                continue
            rule, (epoch, within) = rules[-1] or DocRule(), divmod(block, self.source.n_blocks)
            mine = self.documents(epoch, within)
            whole = {
                d: bool(self.read[epoch][self.ends[d] - self.lengths[d] : self.ends[d]].all())
                for d in mine
                if self.lengths[d] >= max(1, rule.min_doc_len)
            }
            if rule.long_doc_share is None:
                assert all(whole.values())
                continue
            share = rule.long_doc_share
            kinds = [
                [whole[d] for d in whole if (self.lengths[d] >= rule.long_doc_len) is long] for long in (True, False)
            ]
            assert (share > 0 and all(kinds[0])) or (share < 1 and all(kinds[1]))
            if len(rules) == 1:
                off = self.kinds[block]["long"] * (1 - share) - self.kinds[block]["short"] * share
                assert abs(off) <= max(share, 1 - share) + 1e-9

    def documents(self, epoch: int, block: int) -> list[int]:
        starts, _ = self.source._documents(epoch * self.source.n_blocks + block)
        held = [d for d in np.searchsorted(self.ends, starts, side="right").tolist() if d < len(self.lengths)]
        return [d for d in dict.fromkeys(held) if self.lengths[d]]


def test_six_stages_of_differing_rules():
    rng = np.random.default_rng(5)
    rules = [None, DocRule(40), DocRule(0, 150, 0.75), DocRule(25, 100, 0.3), DocRule(0, 60, 0.5), DocRule(100)]
    epochs = 0
    for case in range(12):
        lengths = lengths_of(case, int(rng.integers(40, 150)))
        source = order(lengths, int(rng.integers(8, 60)), seed=case)
        audit, history = Audit(lengths, source), []
        for number in rng.permutation(6).tolist():
            seq_len, rows = int(rng.choice([64, 512, 94, 128, 37])), int(rng.integers(0, 50))
            audit.stage(history, seq_len, rows, rules[number])
            history.append(Visit(seq_len, rows, None, rules[number]))
        audit.conclude()
        epochs += len(audit.read)
    assert epochs > 40


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=2, max_size=40).filter(any),
    block=st.integers(2, 20),
    stages=st.lists(
        st.tuples(
            st.integers(1, 120),
            st.integers(0, 25),
            st.none()
            | st.integers(2, 100).map(DocRule)
            | st.tuples(st.sampled_from((0, 20)), st.integers(21, 120), st.sampled_from(SHARES)).map(
                lambda values: DocRule(*values)
            ),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_nothing_is_read_twice_or_wrongly_whatever_the_documents(lengths, block, stages):
    source = order(lengths, block)
    audit, history = Audit(lengths, source), []
    for seq_len, rows, rule in stages:
        try:
            if rule is not None:
                check_rule(rule, source, seq_len, None)
        except ValueError:
            assume(False)
        audit.stage(history, seq_len, rows, rule)
        history.append(Visit(seq_len, rows, None, rule))
    audit.conclude()


def test_the_share_holds_over_many_blocks():
    """Blocks of a row or two of each kind: rounding each to the nearest would miss the share by far."""
    lengths = lengths_of(3, 3000)
    for share in (0.75, 0.6, 0.1, 1 / 3):
        source = order(lengths, 8)
        audit = Audit(lengths, source)
        audit.stage([], 400, 900, DocRule(10, 120, share))
        counts = sum(audit.kinds.values(), Counter())
        assert len(audit.kinds) > 100
        assert counts["long"] / 900 == pytest.approx(share, abs=0.02)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300), st.sampled_from((*SHARES, 0.7, 1e-6, 0.999)))
def test_the_scarcer_kind_is_read_whole_and_rounding_is_even(n_long, n_short, share):
    rule, turns = DocRule(0, 1, share), [(i << 64) // 1000 for i in range(1000)]
    kept = [rule.rows_kept(n_long, n_short, turn) for turn in turns]
    assert all(long <= n_long and short <= n_short for long, short in kept)
    if 0 < share < 1:
        scarce = 0 if n_long * (1 - share) <= n_short * share else 1
        assert {pair[scarce] for pair in kept} == {(n_long, n_short)[scarce]}
        ratio = (1 - share) / share if scarce == 0 else share / (1 - share)
        mean = sum(pair[1 - scarce] for pair in kept) / 1000
        assert mean == pytest.approx((n_long, n_short)[scarce] * ratio, abs=0.002)
        assert len({pair[1 - scarce] for pair in kept}) <= 2
    else:
        assert set(kept) == {(n_long, 0) if share else (0, n_short)}


def flat(rows):
    return [
        (rows.starts[a:b].tolist(), rows.lengths[a:b].tolist()) for a, b in pairwise(rows.offsets.tolist())
    ]  # fmt: skip


HISTORY = [Visit(64, 100), Visit(100, 60, None, DocRule(30, 120, 0.75)), Visit(512, 9, None, DocRule(20))]
RULE = DocRule(25, 150, 0.6)


def test_any_access_and_any_number_of_ranks_give_the_same_rows():
    lengths = lengths_of(2, 2000)
    whole = flat(order(lengths, 100).enter(HISTORY, 100, None, RULE).rows(np.arange(1500)))
    cursor = order(lengths, 100).enter(HISTORY, 100, None, RULE)
    for part in (np.array([1499]), np.arange(0, 1500, 13), np.array([0, 1, 1498]), np.arange(0)):
        assert flat(cursor.rows(part)) == [whole[c] for c in part]
    for ranks in (2, 3, 8):
        slices = np.array_split(np.arange(500, 740), ranks)
        cursors = [order(lengths, 100).enter(HISTORY, 100, None, RULE) for _ in range(ranks)]
        assert [row for c, s in zip(cursors, slices) for row in flat(c.rows(s))] == whole[500:740]


def test_marks_and_joined_visits_lead_to_the_same_rows(monkeypatch):
    lengths = lengths_of(4, 3000)
    stages = [*HISTORY, Visit(100, 400, None, RULE), Visit(100, 300, None, RULE)]
    marked: list[Visit] = []
    for visit in stages:
        cursor = order(lengths, 64).enter(marked, visit.seq_len, None, visit.rule)
        cursor.rows(np.arange(visit.rows))
        marked.append(visit._replace(mark=cursor.mark(visit.rows)))
    expected = flat(order(lengths, 64).enter(HISTORY, 100, None, RULE).rows(np.arange(800)))[700:]
    assert flat(order(lengths, 64).enter(stages, 100, None, RULE).rows(np.arange(100))) == expected
    packed = []
    original = PackedOrder._make_block
    monkeypatch.setattr(PackedOrder, "_make_block", lambda self, *a: packed.append(a) or original(self, *a))
    assert flat(order(lengths, 64).enter(marked, 100, None, RULE).rows(np.arange(100))) == expected
    assert len(packed) < 20


def test_another_rule_of_a_later_stage_leaves_earlier_rows_alone():
    lengths = lengths_of(6, 500)
    source = order(lengths, 50)
    first = flat(source.enter([], 80, None, RULE).rows(np.arange(40)))
    source.enter([Visit(80, 40, None, RULE)], 80, None, DocRule(60)).rows(np.arange(100))
    assert flat(source.enter([], 80, None, RULE).rows(np.arange(40))) == first
    # a rule that passes everything is not the same as none: it is another stage of the same block
    assert flat(source.enter([Visit(80, 40, None, RULE)], 80).rows(np.arange(5))) != flat(
        source.enter([], 80, None, RULE).rows(np.arange(40, 45))
    )


def test_without_numba_the_rows_are_the_same(monkeypatch):
    lengths = lengths_of(7, 3000)
    expected = flat(order(lengths, 700).enter(HISTORY, 100, None, RULE).rows(np.arange(700)))
    monkeypatch.setattr(compiled, "best_fit", lambda: None)
    assert flat(order(lengths, 700).enter(HISTORY, 100, None, RULE).rows(np.arange(700))) == expected


def test_blocks_without_a_row_are_passed():
    """One long document among 600 in blocks of 10: a row or two an epoch, in one block of 60."""
    lengths = np.full(600, 7)
    lengths[123] = 90
    source = order(lengths, 10)
    audit = Audit(lengths, source)
    audit.stage([], 100, 12, DocRule(0, 50, 0.5))
    counts = sum(audit.kinds.values(), Counter())
    assert counts["long"] == counts["short"] == 6
    assert len(audit.read) == 6


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (DocRule(4096), "/books: min_doc_len = 4096: no document is that long, the longest document has 90 tokens"),
        (DocRule(0, 100, 0.75), r"/books: long_doc_len = 100: no document is that long \(the longest document has 90 "),
        (DocRule(50, 60, 0.75), r"/books: long_doc_len = 60: no document of at least 50 tokens is shorter .* raise"),
    ],
)
def test_a_source_without_the_documents_asked_for_is_an_error(rule, words):
    with pytest.raises(ValueError, match=words):
        check_rule(rule, order([7, 7, 90, 0, 40], 5), 64, None)


def test_kinds_that_never_meet_in_a_block_are_an_error_and_no_endless_search():
    with pytest.raises(ValueError, match=r"/books: long_doc_len = 50, long_doc_share = 0.5: no row in 16 epochs"):
        check_rule(DocRule(0, 50, 0.5), order([7, 7, 90], 1), 64, None)


def test_whole_rows_and_other_orders_take_no_rule():
    rows = order([64] * 9)
    with pytest.raises(ValueError, match=r"/books: min_doc_len = 8: its rows hold several documents and are kept"):
        check_rule(DocRule(8), rows, 64, 30)
    lanes = make_order("lanes", seed=1, fingerprint=b"", lengths=[8], n_tokens=900, name="/web")
    with pytest.raises(ValueError, match=r"/web: min_doc_len = 8: the source is not read document by document"):
        check_rule(DocRule(8), lanes, 8, None)


def test_the_survey_counts_every_document(monkeypatch):
    monkeypatch.setattr(doc_rule, "_CHUNK", 7)
    lengths = lengths_of(8, 100)
    lengths[::9] = 0
    for rule in (DocRule(40), DocRule(0, 80, 0.5), DocRule(20, 80, 0.5)):
        passing = lengths[lengths >= max(1, rule.min_doc_len)]
        long = passing[passing >= rule.long_doc_len] if rule.long_doc_share is not None else passing[:0]
        made = Survey.make(np.cumsum(lengths).astype(np.uint64), rule)
        rest = (len(passing) - len(long), len(long), int(passing.sum() - long.sum()), int(long.sum()))
        assert made == (*rest, int(lengths.max()))


@pytest.mark.parametrize("rule", [DocRule(60), DocRule(0, 150, 0.75), DocRule(30, 90, 0.2)])
@pytest.mark.parametrize("seq_len", [128, 512])
def test_planned_epochs_and_skipped_tokens_are_those_of_the_rows_read(rule, seq_len):
    lengths = lengths_of(9, 4000)
    source = order(lengths, 400)
    cursor = source.enter([], seq_len, None, rule)
    rows = 0
    while (cursor.mark(rows + 1) or (0, 0))[0] < 3 * source.n_blocks:  # three whole epochs
        rows += 1
    read = int(cursor.rows(np.arange(rows)).lengths.sum())
    assert source.planned_epochs([Visit(seq_len, rows, None, rule)]) == pytest.approx(3, rel=0.1)
    assert source.skipped_tokens(seq_len, rule) == pytest.approx(int(lengths.sum()) - read / 3, rel=0.05)
    assert cursor.epoch_at(rows) == pytest.approx(3, abs=0.1)
    sparse = order([7] * 900 + [90], 20)  # the first blocks make no row: full rows of the scarcer kind are taken
    assert sparse.planned_epochs([Visit(45, 8, None, DocRule(0, 50, 0.5))]) == pytest.approx(2)


def test_blocks_grow_where_few_documents_pass():
    assert choose_block([4096], 10**7, 6 * 10**9, 10**7) == 4096
    assert choose_block([4096], 10**7, 6 * 10**9, 10**6) == 40_960
    assert choose_block([4096], 10**7, 6 * 10**9, 10) == packing.MAX_GROWTH * 4096
    assert choose_block([4096], 10**4, 10**10, 10**3) == packing.MAX_BLOCK_TOKENS // 10**6
    ends = np.cumsum(lengths_of(1, 20_000))
    plain, ruled = (
        make_order("packed", seed=1, fingerprint=b"", lengths=[64], doc_ends=ends, rules=rules)
        for rules in ((), (DocRule(200),))
    )
    assert ruled.settings()["block_documents"] > 2 * plain.settings()["block_documents"]
