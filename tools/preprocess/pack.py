"""The `pack` command: documents packed into rows of one length, for trainers that don't pack; or what that would give.

Ours needs no such file: it packs while it trains. By best fit the rows are those of a training run's first epoch, in
its order, with the same `dataset_random_seed`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megastage.data.packing import PackedOrder
from megastage.data.sources.base import IGNORED

from .datasets import DataError, TokenData, check_pages, open_data
from .progress import Progress
from .rowfiles import RowWriter

METHODS = ("best-fit", "concatenate")
LAYOUTS = ("input_ids", "inputs")
_BATCH_TOKENS = 1 << 22


class Pieces(NamedTuple):
    """Rows as pieces of documents: row r is pieces offsets[r] .. offsets[r+1]-1; int64 each, bool for `ended`.

    starts, lengths: in the token stream; ended: whether the piece ends its document.
    """

    offsets: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray


@dataclass(frozen=True)
class Report:
    """What packing gives: the figures of a line of the table."""

    seq_len: int
    method: str
    rows: int
    n_tokens: int
    n_documents: int
    cut_documents: int

    def line(self) -> str:
        padding = 100 * (1 - self.n_tokens / (self.rows * self.seq_len))
        share = 100 * self.cut_documents / self.n_documents
        rows = f"{self.seq_len:>9,}  {self.method:<11} {self.rows:>13,} {padding:>8.3f} %"
        return f"{rows} {self.cut_documents:>13,} ({share:.2f} %)"


def run(options: Namespace) -> int:
    """Pack `options.path` into `options.output`, or report only; returns the exit code."""
    data = open_data(options.path)
    if options.output is None:
        methods = METHODS if options.method is None else (options.method,)
        _print([_report(data, length, method, options.seed) for length in options.seq_len for method in methods])
        return 0
    if len(options.seq_len) > 1:
        raise DataError(
            f"--seq-len {options.seq_len}: a folder holds rows of one length; leave out --output to compare"
        )
    (seq_len,), method = options.seq_len, options.method or "best-fit"
    limit = data.tokenizer.id_limit if data.tokenizer else 1 << 31
    if options.pad_id is not None and not 0 <= options.pad_id < min(limit, 1 << 31):
        raise DataError(f"--pad-id {options.pad_id}: outside the vocabulary, 0 .. {min(limit, 1 << 31) - 1}")
    check_pages(data)
    note = f"{method} rows of {seq_len} tokens, seed {options.seed}, packed from {data.kind} by megastage-preprocess"
    progress = Progress(data.n_tokens, "pack")
    rows = 0
    try:
        with RowWriter(options.output, options.to, note, overwrite=options.overwrite) as writer:
            for pieces in _rows(data, seq_len, method, options.seed):
                for part in _batches(pieces):
                    writer.write(columns(data, part, seq_len, options.layout, options.pad_id))
                    progress.add(int(part.lengths.sum()))
                rows += pieces.offsets.size - 1
    finally:
        progress.close()
    cut = _cut_documents(data, seq_len, method)
    _print([Report(seq_len, method, rows, data.n_tokens, data.n_documents, cut)])
    print(f"{options.output}: {options.to}, layout {options.layout}, {writer.n_files} files")
    return 0


def _report(data: TokenData, seq_len: int, method: str, seed: int) -> Report:
    rows = sum(pieces.offsets.size - 1 for pieces in _rows(data, seq_len, method, seed))
    return Report(seq_len, method, rows, data.n_tokens, data.n_documents, _cut_documents(data, seq_len, method))


def _print(reports: list[Report]) -> None:
    print(f"{'seq_len':>9}  {'method':<11} {'rows':>13} {'padding':>10} {'cut documents':>13}")
    for report in reports:
        print(report.line())


def _cut_documents(data: TokenData, seq_len: int, method: str) -> int:
    lengths = data.lengths()
    if method == "best-fit":
        return int((lengths > seq_len).sum())
    stops = np.cumsum(lengths)
    return int(((stops - lengths) // seq_len != np.maximum(stops - 1, 0) // seq_len)[lengths > 0].sum())


def _rows(data: TokenData, seq_len: int, method: str, seed: int) -> Iterator[Pieces]:
    """All rows, some at a time; every token is in just one of them."""
    ends = data.source.doc_ends
    if method == "concatenate":
        yield from _concatenated(ends, data.n_tokens, seq_len)
        return
    order = PackedOrder.make(ends, [seq_len], seed, data.source.fingerprint, name=data.path)
    for number in range(order.n_blocks):
        packed = order.block(number, seq_len)
        stops = (packed.pieces.starts + packed.pieces.lengths).astype(ends.dtype)
        ended = ends[np.searchsorted(ends, stops)] == stops
        yield Pieces(packed.offsets, packed.pieces.starts, packed.pieces.lengths, ended)


def _concatenated(ends: np.ndarray, n_tokens: int, seq_len: int) -> Iterator[Pieces]:
    """Windows of the stream, cut into pieces where documents end."""
    step = max(1, _BATCH_TOKENS // seq_len) * seq_len
    for first in range(0, n_tokens, step):
        stop = min(first + step, n_tokens)
        low, high = np.searchsorted(ends, np.array([first, stop], ends.dtype), "right")
        inner = ends[low:high].astype(np.int64)
        stops = np.union1d(inner, np.append(np.arange(first + seq_len, stop, seq_len), stop))
        starts = np.concatenate(([first], stops[:-1]))
        offsets = np.searchsorted(starts, np.append(np.arange(first, stop, seq_len), stop))
        yield Pieces(offsets, starts, stops - starts, np.isin(stops, inner))


def _batches(pieces: Pieces) -> Iterator[Pieces]:
    """The same rows, at most some million tokens at a time (but a row at least)."""
    tokens = np.concatenate(([0], np.cumsum(pieces.lengths)))[pieces.offsets]
    row, n_rows = 0, pieces.offsets.size - 1
    while row < n_rows:
        stop = max(row + 1, int(np.searchsorted(tokens, tokens[row] + _BATCH_TOKENS, "right")) - 1)
        part = slice(pieces.offsets[row], pieces.offsets[stop])
        offsets = pieces.offsets[row : stop + 1] - pieces.offsets[row]
        yield Pieces(offsets, pieces.starts[part], pieces.lengths[part], pieces.ended[part])
        row = stop


def columns(
    data: TokenData, pieces: Pieces, seq_len: int, layout: str, pad_id: int | None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The columns of R rows as (int64[R + 1] row bounds, int32 values).

    Layout "input_ids": labels of the same positions, -100 at the first token of a piece. "inputs": labels of the next
    position, -100 behind a document. With `pad_id` rows are filled up to seq_len, the padding a sequence of its own.
    """
    counts, valid = np.diff(pieces.offsets), np.add.reduceat(pieces.lengths, pieces.offsets[:-1])
    room = seq_len - valid if pad_id is not None else np.zeros_like(valid)
    bounds = np.concatenate(([0], np.cumsum(valid + room)))
    before = np.concatenate(([0], np.cumsum(pieces.lengths)))[:-1]
    row = np.repeat(np.arange(counts.size), counts)
    at = bounds[row] + before - before[pieces.offsets[:-1]][row]
    tokens = np.full(bounds[-1], -1 if pad_id is None else pad_id, np.int32)
    labels = np.full(bounds[-1], IGNORED, np.int32)
    shifted = layout == "inputs"
    n_tokens = data.n_tokens
    triples = zip(at.tolist(), pieces.starts.tolist(), pieces.lengths.tolist(), pieces.ended.tolist(), strict=True)
    for to, start, length, ended in triples:
        read = data.source.read(start, min(start + length + 1, n_tokens))
        tokens[to : to + length] = read[:length]
        labels[to + (not shifted) : to + length - shifted] = read[1:length]
        if shifted and not ended:
            labels[to + length - 1] = read[length]
    padded = np.flatnonzero(room)
    starts = np.sort(np.concatenate((at, bounds[padded] + valid[padded])))
    lengths = np.diff(starts, append=bounds[-1])
    positions = np.arange(bounds[-1]) - np.repeat(starts, lengths)
    sequences = np.concatenate(([0], np.cumsum(counts + (room > 0))))
    return {
        "inputs" if shifted else "input_ids": (bounds, tokens),
        "labels": (bounds, labels),
        "position_ids": (bounds, positions.astype(np.int32)),
        "sequence_lengths": (sequences, lengths.astype(np.int32)),
    }
