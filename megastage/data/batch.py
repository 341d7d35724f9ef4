"""From pieces of sources to the tensors of a step. Shape legend: B rows, T tokens of a row, C document bounds.

Nothing of size T x T is made: documents travel as `cu_seqlens_BC`, each row's 0 and ascending document ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megastage.data.buffers import BufferPool
from megastage.data.compiled_rows import row_kernels_in_use
from megastage.data.fetch import RowTools, fill_compiled
from megastage.data.order import Rows
from megastage.data.sources.base import IGNORED, SourceError, TokenSource

_POSITIONS = BufferPool()  # for batches that stay on the CPU
_SHORT = 100  # tokens: shorter documents on average are faster counted all at once than one by one


@dataclass
class Batch:
    """One data rank's rows of one optimizer step.

    tokens_BT: int64, 0 in the padding. labels_BT: int64, the next token, -100 where the loss looks away (document ends
    when documents are isolated, padding, loss masks). cu_seqlens_BC: int32, per row 0 and document ends, the last end
    repeated as padding; C is a power of two; without document_mask [0, end]. What lies beyond a row's last end is
    padding. source_B: int32, index into the stage's sources. ids_B: int64, position in the stage's global sample order.
    shard_positions_BT: the positions, once they are made, or where rows are cut among ranks and T is not the whole row.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    cu_seqlens_BC: Tensor
    source_B: Tensor
    ids_B: Tensor
    shard_positions_BT: Tensor | None = None

    @property
    def positions_BT(self) -> Tensor:
        """int64[B, T]: where each token stands in its document, from the bounds; beyond the last one from 0 again.

        Made when asked for, on the batch's device: a third of what would have to be written and copied there.
        """
        if self.shard_positions_BT is None:
            self.shard_positions_BT = positions_of(self.cu_seqlens_BC, self.tokens_BT.shape[1])
        return self.shard_positions_BT

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of `rows` rows in order (the last may be smaller); views, no copies."""
        if rows < 1:
            raise ValueError(f"micro-batch of {rows} rows: must be at least 1")
        count = -(-len(self.ids_B) // rows)
        cut = [[None] * count if values is None else values.split(rows) for values in self._values()]
        return [Batch(*columns) for columns in zip(*cut, strict=True)]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; copies from pinned memory do not block."""
        values: list[Any] = [None if value is None else value.to(device, non_blocking=True) for value in self._values()]
        return Batch(*values)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, for fast copies to a GPU."""
        values: list[Any] = [None if value is None else value.pin_memory() for value in self._values()]
        return Batch(*values)

    def _values(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]


def positions_of(cu_seqlens_BC: Tensor, seq_len: int) -> Tensor:
    """int64[B, seq_len]: the distance of each column to the last document bound at or before it."""
    B = cu_seqlens_BC.shape[0]
    if cu_seqlens_BC.is_cuda:
        column_BT = torch.arange(seq_len, device=cu_seqlens_BC.device, dtype=torch.int32).expand(B, -1).contiguous()
        last_BT = torch.searchsorted(cu_seqlens_BC, column_BT, right=True) - 1
        return (column_BT - cu_seqlens_BC.gather(1, last_BT)).long()
    kernels = row_kernels_in_use()
    if kernels is not None:
        out = _POSITIONS.tensor(B * seq_len)
        kernels.positions(cu_seqlens_BC.numpy(), seq_len, out.numpy())
        return out.view(B, seq_len)
    flat = (cu_seqlens_BC.numpy() + np.arange(0, B * seq_len, seq_len)[:, None]).ravel()
    starts = flat[np.flatnonzero(np.diff(flat, prepend=-1))]
    return _positions(starts[starts < B * seq_len], B, seq_len)


def assemble(
    sources: Sequence[TokenSource],
    source_B: np.ndarray,
    ids_B: np.ndarray,
    rows: Rows,
    *,
    seq_len: int,
    document_mask: bool,
    vocab_size: int | None = None,
    tools: RowTools | None = None,
) -> Batch:
    """Read the pieces of B rows, `sources[source_B[r]]` for row r, into one batch of [B, seq_len].

    tools: memory that is used again, and compiled loops with the same results.
    A piece's last label is the next token of its document or stream; at a document's end -100 with `document_mask`,
    else the first token of the row's next piece. Raises SourceError for a token id outside 0 .. vocab_size - 1.
    """
    B, T, tools = len(source_B), seq_len, tools or RowTools()
    both = tools.pool.tensor(2 * B * T)
    tokens, labels = both.numpy().reshape(2, B * T)
    cu_BC = fill_compiled(
        tools, sources, source_B, rows, tokens, labels, document_mask=document_mask, vocab_size=vocab_size
    )
    if cu_BC is None:
        pieces = _Pieces.place(source_B, rows, T)
        cu_BC = _fill_plain(sources, pieces, tokens, labels, T, document_mask, vocab_size)
    tokens_BT, labels_BT = both.view(2, B, T).unbind()
    return Batch(
        tokens_BT,
        labels_BT,
        torch.from_numpy(cu_BC),
        torch.from_numpy(source_B.astype(np.int32)),
        torch.from_numpy(ids_B.astype(np.int64)),
    )


def _fill_plain(
    sources: Sequence[TokenSource],
    pieces: _Pieces,
    tokens: np.ndarray,
    labels: np.ndarray,
    T: int,
    document_mask: bool,
    vocab_size: int | None,
) -> np.ndarray:
    """Fill flat tokens and labels, int64[B * T]; returns cu_seqlens, int32[B, C]. The twin of `fill_compiled`."""
    padded = np.flatnonzero(pieces.valid_B < T).tolist()
    for r in padded:
        tokens[r * T + pieces.valid_B[r] : (r + 1) * T] = 0
    last_label = _read_tokens(sources, pieces, tokens, labels)
    last = pieces.at + pieces.lengths - 1
    labels[last] = tokens[(last + 1) % tokens.size]
    _mask_targets(sources, pieces, labels, last_label)
    if document_mask:
        labels[last] = last_label
    else:
        ended, followed = _document_joints(sources, pieces)
        labels[last] = np.where(ended, np.where(followed, labels[last], IGNORED), last_label)
    for r in padded:
        labels[r * T + pieces.valid_B[r] : (r + 1) * T] = IGNORED
    given = _given_labels(sources, pieces, labels)
    _check_vocabulary(sources, pieces, (tokens, last_label, *given), vocab_size)
    if document_mask:
        ends = _document_ends(sources, pieces)
        labels[ends - 1] = IGNORED
        # a piece starts afresh even where its document goes on in another row
        ends = np.union1d(ends, last + 1)
    else:
        ends = np.arange(len(pieces.valid_B)) * T + pieces.valid_B
    return _cu_seqlens(ends, pieces.valid_B, T)


@dataclass(frozen=True)
class _Pieces:
    """P pieces: row, source, first token in the source's stream, length, place in the flat [B * T] buffers."""

    row: np.ndarray
    source: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    at: np.ndarray
    valid_B: np.ndarray

    @classmethod
    def place(cls, source_B: np.ndarray, rows: Rows, T: int) -> _Pieces:
        counts = np.diff(rows.offsets)
        row = np.repeat(np.arange(len(counts)), counts)
        ends = np.concatenate([[0], np.cumsum(rows.lengths)])
        valid_B = ends[rows.offsets[1:]] - ends[rows.offsets[:-1]]
        assert len(source_B) == len(counts)
        assert valid_B.min() > 0
        assert valid_B.max() <= T
        at = ends[:-1] - np.repeat(ends[rows.offsets[:-1]], counts) + row * T
        return cls(row, source_B[row], rows.starts, rows.lengths, at, valid_B)

    def of(self, number: int) -> np.ndarray:
        return np.flatnonzero(self.source == number)

    def used(self) -> list[int]:
        return np.unique(self.source).tolist()


def _read_tokens(sources: Sequence[TokenSource], pieces: _Pieces, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Fill the flat tokens, and labels but for each piece's last.

    Returns int64[P], the token behind each piece (-100 at the end of the source).
    """
    last_label = np.full(len(pieces.at), IGNORED, np.int64)
    triples = zip(pieces.source.tolist(), pieces.starts.tolist(), pieces.lengths.tolist(), pieces.at.tolist())
    for p, (number, start, length, at) in enumerate(triples):
        source = sources[number]
        if start + length < source.readable_to(start):
            read = source.read(start, start + length + 1)
            tokens[at : at + length] = read[:length]
            last_label[p] = read[length]
        else:
            tokens[at : at + length] = source.read(start, start + length)
        labels[at : at + length - 1] = tokens[at + 1 : at + length]  # while they are still in the cache
    return last_label


def _mask_targets(sources: Sequence[TokenSource], pieces: _Pieces, labels: np.ndarray, last_label: np.ndarray) -> None:
    """Apply loss masks, which say of each token whether it is a target, to labels and to the token behind a piece."""
    for number in pieces.used():
        source = sources[number]
        if not source.has_loss_mask:
            continue
        for p in pieces.of(number).tolist():
            start, length, at = int(pieces.starts[p]), int(pieces.lengths[p]), int(pieces.at[p])
            mask = source.loss_mask(start, min(start + length + 1, source.n_tokens))
            assert mask is not None
            # token i is the target of the position in front of it
            first = 0 if at else 1
            labels[at + np.flatnonzero(~mask[first:length]) + first - 1] = IGNORED
            if len(mask) > length and not mask[length]:
                last_label[p] = IGNORED


def _document_joints(sources: Sequence[TokenSource], pieces: _Pieces) -> tuple[np.ndarray, np.ndarray]:
    """bool[P], bool[P]: the piece ends a packed document; another piece follows in its row."""
    ended = np.zeros(len(pieces.at), np.bool_)
    for number in pieces.used():
        source = sources[number]
        if source.kind == "documents":
            mine = pieces.of(number)
            ended[mine] = source.end_units(pieces.starts[mine] + pieces.lengths[mine])
    return ended, np.append(pieces.row[1:] == pieces.row[:-1], False)


def _given_labels(sources: Sequence[TokenSource], pieces: _Pieces, labels: np.ndarray) -> list[np.ndarray]:
    """Put labels that come with the data in place; returns them."""
    given = []
    for number in pieces.used():
        source = sources[number]
        if not source.has_labels:
            continue
        for p in pieces.of(number).tolist():
            start, length, at = int(pieces.starts[p]), int(pieces.lengths[p]), int(pieces.at[p])
            given.append(labels[at : at + length])
            given[-1][:] = source.labels(start, start + length)
    return given


def _document_ends(sources: Sequence[TokenSource], pieces: _Pieces) -> np.ndarray:
    """int64: ends of documents in flat coordinates (an end at row r's column c is r * T + c, c > 0)."""
    found = []
    for number in pieces.used():
        mine = pieces.of(number)
        starts = pieces.starts[mine]
        offsets, ends = sources[number].document_ends(starts, starts + pieces.lengths[mine])
        found.append(ends + np.repeat(pieces.at[mine] - starts, np.diff(offsets)))
    return np.concatenate(found)


def _positions(starts: np.ndarray, B: int, T: int) -> Tensor:
    """int64[B, T]: positions from 0 at each of `starts`, which ascend in flat coordinates and hold the row starts."""
    out = _POSITIONS.tensor(B * T)
    lengths = np.diff(starts, append=B * T)
    if len(starts) * _SHORT > B * T:
        np.subtract(np.arange(B * T), np.repeat(starts, lengths), out=out.numpy())
        return out.view(B, T)
    positions, count = out.numpy(), np.arange(T)
    for start, length in zip(starts.tolist(), lengths.tolist()):
        positions[start : start + length] = count[:length]
    return out.view(B, T)


def _cu_seqlens(ends: np.ndarray, valid_B: np.ndarray, T: int) -> np.ndarray:
    """int32[B, C] from the sorted distinct flat ends; the last end of every row is its valid length."""
    B = len(valid_B)
    row = (ends - 1) // T
    counts = np.bincount(row, minlength=B)
    C = 1 << int(counts.max()).bit_length()  # counts.max() + 1 bounds, rounded up
    cu_BC = np.repeat(valid_B.astype(np.int32)[:, None], C, axis=1)
    cu_BC[:, 0] = 0
    column = 1 + np.arange(len(ends)) - np.repeat(np.cumsum(counts) - counts, counts)
    cu_BC[row, column] = ends - row * T
    return cu_BC


def _check_vocabulary(
    sources: Sequence[TokenSource], pieces: _Pieces, values: Sequence[np.ndarray], vocab_size: int | None
) -> None:
    """values: the flat tokens, the token behind each piece, then labels that came with the data; -100 passes."""
    limit = 1 << 62 if vocab_size is None else vocab_size
    tokens, last_label = values[0], values[1]
    # as unsigned numbers negative ones are too large as well, so that one pass finds both
    if int(tokens.view(np.uint64).max()) < limit and all(_within(labels, limit) for labels in values[1:]):
        return
    bad = np.flatnonzero(tokens.view(np.uint64) >= limit)
    behind = np.flatnonzero((last_label >= limit) | ((last_label < 0) & (last_label != IGNORED)))
    if bad.size:
        flat = int(bad[0])
        p = int(np.searchsorted(pieces.at, flat, "right")) - 1
        wrong, where = int(tokens[flat]), f"at position {int(pieces.starts[p]) + flat - int(pieces.at[p])}"
    elif behind.size:
        p = int(behind[0])
        wrong, where = int(last_label[p]), f"at position {int(pieces.starts[p] + pieces.lengths[p])}"
    else:
        labels = next(labels for labels in values[2:] if not _within(labels, limit))
        p = next(p for p, number in enumerate(pieces.source.tolist()) if sources[number].has_labels)
        wrong, where = int(labels.max() if labels.max() >= limit else labels.min()), "among the labels"
    raise SourceError(
        f"{sources[int(pieces.source[p])].path}: token {wrong} {where} of its stream is outside the model's vocabulary"
        f" of {limit}; use the tokenizer that made the data, or a model with a larger vocabulary"
    )


def _within(labels: np.ndarray, limit: int) -> bool:
    return not labels.size or bool(labels.max() < limit and ((labels >= 0) | (labels == IGNORED)).all())
