"""Row assembly against a slow assembler written token by token, and hand-made rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megastage.data.batch import Batch, assemble, positions_of
from megastage.data.buffers import BufferPool
from megastage.data.compiled_rows import row_kernels
from megastage.data.fetch import RowTools
from megastage.data.order import Rows
from megastage.data.sources.base import Part, SourceError, TokenSource

IGNORED = -100


def source_of(docs, kind, *, loss=None, labels=None, units=None):
    tokens = np.array([t for doc in docs for t in doc], np.uint16)
    ends = np.cumsum([len(doc) for doc in docs]).astype(np.uint64)
    if labels is not None:
        inner = np.setdiff1d(ends, units)
        part = Part(tokens, inner, labels=labels, unit_ends=np.array(units))
    else:
        part = Part(tokens, ends, loss_mask=loss)
    return TokenSource([part], path="here", dataset_type="nanoset", kind=kind)


def rows_of(*rows):
    pieces = [piece for row in rows for piece in row]
    return Rows(
        np.cumsum([0, *map(len, rows)]),
        np.array([start for start, _ in pieces]),
        np.array([length for _, length in pieces]),
    )


def slow(source, rows, T, mask):
    """One row at a time, one token at a time: (tokens, labels, positions, document bounds)."""
    tokens = source.read(0, source.n_tokens).tolist()
    keep = source.loss_mask(0, source.n_tokens)
    ends = set(source.doc_ends.tolist())
    out = []
    for r in range(len(rows.offsets) - 1):
        ids, labels, positions, bounds = [], [], [], [0]
        pieces = list(range(rows.offsets[r], rows.offsets[r + 1]))
        for number, p in enumerate(pieces):
            start, length = int(rows.starts[p]), int(rows.lengths[p])
            for i in range(start, start + length):
                fresh = i == start or i in ends
                positions.append(0 if mask and fresh else (positions[-1] + 1 if positions else 0))
                if mask and fresh and ids:
                    bounds.append(len(ids))
                ids.append(tokens[i])
                target = i + 1 if i + 1 < len(tokens) else None
                if i + 1 in ends and mask:
                    target = None
                elif i + 1 == start + length and i + 1 in ends and source.kind == "documents":
                    target = int(rows.starts[p + 1]) if number + 1 < len(pieces) else None
                if target is not None and keep is not None and not keep[target]:
                    target = None
                labels.append(IGNORED if target is None else tokens[target])
        bounds.append(len(ids))
        out.append((ids, labels, positions, bounds))
    return out


def plain_positions(batch):
    """Counted from bound to bound."""
    rows = []
    for bounds in batch.cu_seqlens_BC.tolist():
        ends = [*bounds[1:], batch.tokens_BT.shape[1]]
        rows.append([i for start, end in zip(bounds, ends) for i in range(end - start)])
    return torch.tensor(rows)


def both(sources, source_B, ids_B, rows, **kwargs):
    """By the plain code, after it was shown that the compiled loops give the same."""
    batch = assemble(sources, source_B, ids_B, rows, **kwargs)
    batch.shard_positions_BT = plain_positions(batch)
    kernels = row_kernels()
    if kernels is not None:
        compiled = assemble(sources, source_B, ids_B, rows, **kwargs, tools=RowTools(kernels=kernels))
        for name in ("tokens_BT", "labels_BT", "positions_BT", "cu_seqlens_BC", "source_B", "ids_B"):
            assert torch.equal(getattr(compiled, name), getattr(batch, name)), name
    return batch


def check(batch, source, rows, T, mask):
    C = batch.cu_seqlens_BC.shape[1]
    assert C & (C - 1) == 0
    for r, (ids, labels, positions, bounds) in enumerate(slow(source, rows, T, mask)):
        n = len(ids)
        assert batch.tokens_BT[r].tolist() == ids + [0] * (T - n)
        assert batch.labels_BT[r].tolist() == labels + [IGNORED] * (T - n)
        assert batch.positions_BT[r, :n].tolist() == positions
        assert batch.cu_seqlens_BC[r].tolist() == bounds + [n] * (C - len(bounds))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_streams_equal_the_slow_assembler(data):
    docs = data.draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=2, max_size=12))
    total = sum(map(len, docs))
    loss = data.draw(st.none() | st.lists(st.integers(0, 1), min_size=total, max_size=total))
    source = source_of(docs, "stream", loss=None if loss is None else np.array(loss, np.uint8))
    T = data.draw(st.integers(1, total - 1 if total > 2 else 1))
    starts = data.draw(st.lists(st.integers(0, total - T), min_size=1, max_size=5))
    rows, mask = rows_of(*[[(start, T)] for start in starts]), data.draw(st.booleans())
    B = len(starts)
    batch = both([source], np.zeros(B, np.int64), np.arange(B), rows, seq_len=T, document_mask=mask)
    check(batch, source, rows, T, mask)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_packed_documents_equal_the_slow_assembler(data):
    docs = data.draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=2, max_size=12))
    total = sum(map(len, docs))
    loss = data.draw(st.none() | st.lists(st.integers(0, 1), min_size=total, max_size=total))
    source = source_of(docs, "documents", loss=None if loss is None else np.array(loss, np.uint8))
    T = data.draw(st.integers(2, 20))
    starts = np.cumsum([0, *map(len, docs[:-1])]).tolist()
    pieces = []
    for start, doc in zip(starts, docs):
        cut = data.draw(st.integers(0, len(doc) - 1))
        pieces += [(start, cut), (start + cut, len(doc) - cut)] if cut else [(start, len(doc))]
    rows = [[]]
    for start, length in data.draw(st.permutations(pieces)):
        length = min(length, T)
        if sum(n for _, n in rows[-1]) + length > T:
            rows.append([])
        rows[-1].append((start, length))
    ragged, mask = rows_of(*rows), data.draw(st.booleans())
    B = len(rows)
    batch = both([source], np.zeros(B, np.int64), np.arange(B), ragged, seq_len=T, document_mask=mask)
    check(batch, source, ragged, T, mask)


def test_a_hand_made_row():
    source = source_of([[5, 6, 7], [8, 9], [10, 11, 12, 13]], "stream")
    batch = both([source], np.array([0]), np.array([41]), rows_of([(1, 6)]), seq_len=6, document_mask=True)
    assert batch.tokens_BT.tolist() == [[6, 7, 8, 9, 10, 11]]
    assert batch.labels_BT.tolist() == [[7, -100, 9, -100, 11, 12]]
    assert batch.positions_BT.tolist() == [[0, 1, 0, 1, 0, 1]]
    assert batch.cu_seqlens_BC.tolist() == [[0, 2, 4, 6]]
    assert batch.cu_seqlens_BC.dtype == torch.int32
    assert batch.ids_B.tolist() == [41]
    assert batch.source_B.dtype == torch.int32
    whole = both([source], np.array([0]), np.array([0]), rows_of([(1, 6)]), seq_len=6, document_mask=False)
    assert whole.labels_BT.tolist() == [[7, 8, 9, 10, 11, 12]]
    assert whole.positions_BT.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert whole.cu_seqlens_BC.tolist() == [[0, 6]]


def test_given_labels_are_kept_to_the_row_end_and_masked_between_documents():
    labels = np.array([6, 8, 9, 40, 11, 12, 13, -100])
    source = source_of([[5, 6], [8, 9], [10, 11, 12, 13]], "documents", labels=labels, units=[4, 8])
    rows = rows_of([(0, 4)], [(4, 4)])
    batch = both([source], np.zeros(2, int), np.arange(2), rows, seq_len=4, document_mask=True)
    assert batch.labels_BT.tolist() == [[6, -100, 9, 40], [11, 12, 13, -100]]
    assert batch.positions_BT.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    open_ = both([source], np.zeros(2, int), np.arange(2), rows, seq_len=4, document_mask=False)
    assert open_.labels_BT.tolist() == [[6, 8, 9, 40], [11, 12, 13, -100]]


def test_sources_mix_row_by_row():
    a, b = source_of([[1, 2, 3, 4, 5]], "stream"), source_of([[6, 7], [8]], "documents")
    rows = rows_of([(0, 3)], [(2, 1), (0, 2)], [(1, 3)])
    batch = both([a, b], np.array([0, 1, 0]), np.array([3, 4, 5]), rows, seq_len=3, document_mask=True)
    assert batch.tokens_BT.tolist() == [[1, 2, 3], [8, 6, 7], [2, 3, 4]]
    assert batch.labels_BT.tolist() == [[2, 3, 4], [-100, 7, -100], [3, 4, 5]]
    assert batch.source_B.tolist() == [0, 1, 0]


def test_tokens_beyond_the_vocabulary_name_source_and_position():
    source = source_of([[1, 2, 3, 4, 5, 99, 6]], "stream")
    rows = rows_of([(0, 3)], [(3, 3)])
    assemble([source], np.zeros(2, int), np.arange(2), rows, seq_len=3, document_mask=True, vocab_size=100)
    with pytest.raises(SourceError, match=r"here: token 99 at position 5 .* vocabulary of 50"):
        assemble([source], np.zeros(2, int), np.arange(2), rows, seq_len=3, document_mask=True, vocab_size=50)
    # also when it is only the label of the last token
    with pytest.raises(SourceError, match="token 99"):
        assemble(
            [source], np.zeros(1, int), np.arange(1), rows_of([(2, 3)]), seq_len=3, document_mask=True, vocab_size=50
        )


def test_negative_tokens_are_refused():
    part = Part(np.array([1, 2, -3, 4], np.int32), np.array([4]))
    source = TokenSource([part], path="here", dataset_type="megatron", kind="stream")
    with pytest.raises(SourceError, match="token -3 at position 2"):
        assemble([source], np.zeros(1, int), np.arange(1), rows_of([(0, 3)]), seq_len=3, document_mask=True)


def test_split_gives_micro_batches_in_order():
    source = source_of([[1, 2, 3, 4, 5, 6, 7, 8, 9]], "stream")
    rows = rows_of(*[[(start, 2)] for start in range(5)])
    batch = both([source], np.zeros(5, int), np.arange(5), rows, seq_len=2, document_mask=True)
    parts = batch.split(2)
    assert [len(part.ids_B) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.tokens_BT for part in parts]), batch.tokens_BT)
    assert isinstance(parts[0], Batch)
    assert parts[1].to("cpu").ids_B.tolist() == [2, 3]
    with pytest.raises(ValueError, match="micro-batch of 0 rows"):
        batch.split(0)


def test_nothing_grows_with_the_square_of_the_length():
    T = 32_768
    part = Part(np.ones(4 * T + 1, np.uint16), np.arange(64, 4 * T + 64, 64).clip(max=4 * T + 1))
    source = TokenSource([part], path="here", dataset_type="nanoset", kind="stream")
    rows = rows_of(*[[(r * T, T)] for r in range(4)])
    batch = both([source], np.zeros(4, int), np.arange(4), rows, seq_len=T, document_mask=True)
    assert batch.positions_BT.shape == (4, T)
    sizes = [getattr(batch, name).numel() for name in batch.__dataclass_fields__]
    assert max(sizes) == 4 * T
    assert batch.cu_seqlens_BC.shape == (4, 1024)


def test_files_of_one_source_are_joined_also_by_compiled_loops():
    docs = [[1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
    parts = [
        Part(np.array(docs[0] + docs[1], np.int32), np.array([3, 7])),
        Part(np.array(docs[2] + docs[3], np.int32), np.array([2, 7], np.uint64)),
    ]
    for kind in ("stream", "documents"):
        source = TokenSource(parts, path="here", dataset_type="megatron", kind=kind)
        for rows in (rows_of([(3, 4)], [(7, 4)]), rows_of([(5, 4)], [(9, 4)]), rows_of([(9, 3), (0, 2)], [(3, 4)])):
            for mask in (True, False):
                batch = both(
                    [source], np.zeros(2, int), np.arange(2), rows, seq_len=5, document_mask=mask, vocab_size=15
                )
                check(batch, source, rows, 5, mask)


@pytest.mark.skipif(row_kernels() is None, reason="numba is not installed")
def test_plain_sources_are_read_by_the_compiled_loops(monkeypatch):
    source = source_of([[1, 2, 3, 4, 5], [6, 7, 8]], "stream")
    monkeypatch.setattr("megastage.data.batch._fill_plain", None)
    assemble(
        [source], np.zeros(1, int), np.arange(1), rows_of([(1, 6)]), seq_len=6, document_mask=True,
        tools=RowTools(kernels=row_kernels()),
    )  # fmt: skip


def test_memory_is_lent_again_only_when_nobody_holds_it():
    pool = BufferPool()
    first = pool.tensor(1000)
    kept = first.view(10, 100)[3:5]
    address = first.data_ptr()
    kept.fill_(7)
    del first
    second = pool.tensor(1000)
    second.fill_(1)
    assert second.data_ptr() != address
    assert (kept == 7).all()
    del kept
    assert pool.tensor(1000).data_ptr() == address


@pytest.mark.parametrize("compiled", [True, False])
def test_positions_from_bounds(monkeypatch, compiled):
    monkeypatch.setattr("megastage.data.batch.row_kernels_in_use", row_kernels if compiled else lambda: None)
    cu_BC = torch.tensor([[0, 2, 5, 5], [0, 6, 6, 6]], dtype=torch.int32)
    assert positions_of(cu_BC, 6).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
