"""Plan lines of the data: what each stage will read of each source, in tokens and epochs, before a step is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megastage.data.blend import is_exact
from megastage.data.doc_rule import rule_of
from megastage.data.index import DataIndex, DataStage
from megastage.data.lanes import LaneOrder
from megastage.data.live_streams import LiveOrder
from megastage.data.order import Visit
from megastage.data.packing import PackedOrder
from megastage.data.state import StageRecord, histories, record_of

_TOLD_PADDING = 0.005


def plan_lines(
    stage: DataStage, stages: Sequence[DataStage], index: DataIndex, records: Sequence[StageRecord]
) -> list[str]:
    """Lines to print under a stage of the plan; `records` are what earlier stages really consumed, if they did."""
    if stage.index not in index.stages:
        return []
    mine = index.stages[stage.index]
    past = [_planned(s, index, records) for s in stages if s.index < stage.index and s.index in index.stages]
    planned = _planned(stage, index, [])
    rows = mine.table.counts_at(planned.samples).tolist()
    visits = histories(past, index)
    lines = []
    for number, source in enumerate(mine.sources):
        key = mine.order_key(number)
        if key not in index.orders or not mine.weights[number]:
            lines.append(f"Source {source.path}: not drawn (weight 0)")
            continue
        order, before = index.orders[key], visits.get(key, [])
        start = order.planned_epochs(before)
        visit = Visit(stage.seq_len, rows[number], None, rule_of(stage))
        stop = order.planned_epochs([*before, visit])
        about = "about " if isinstance(order, LiveOrder) else ""
        padding = order.padding(visit.seq_len, visit.rule) if isinstance(order, PackedOrder) else 0.0
        read = rows[number] * stage.seq_len * (1 - padding)
        line = (
            f"Source {source.path}: {read / 1e9:.2f}B of {about}{source.n_tokens / 1e9:.2f}B tokens, "
            f"{stop - start:.2f} epochs ({start:.2f} -> {stop:.2f})"
        )
        if padding >= _TOLD_PADDING:
            line += f", padding: about {padding:.1%} of the positions"
        lines.append(line + _skipped(order, before, visit))
    return lines + _notes(stage, mine.weights)


def _planned(stage: DataStage, index: DataIndex, records: Sequence[StageRecord]) -> StageRecord:
    """What a stage consumed (when it is over) or will consume by its end."""
    for number, record in enumerate(records):
        if record.index == stage.index and number < len(records) - 1:
            return record
    record = record_of(stage, index)
    record.samples = (stage.end_step - stage.start_step) * stage.global_batch_size
    return record


def _skipped(order: Any, before: Sequence[Visit], visit: Visit) -> str:
    seq_len, visits = visit.seq_len, list(before)
    if isinstance(order, PackedOrder) and visit.rule is not None:
        about = "" if visit.rule.long_doc_share is None else "about "
        return f", skipped: {about}{order.skipped_tokens(seq_len, visit.rule):,} tokens an epoch ({visit.rule})"
    if not isinstance(order, LaneOrder):
        return ""
    if visits and visits[-1].seq_len == seq_len:
        visits = []
    entry, epoch = order.enter(visits, seq_len).skipped_tokens, order.unread_tokens(seq_len)
    return f", skipped: {entry:,} tokens at entry, {epoch:,} an epoch"


def _notes(stage: DataStage, integers: np.ndarray) -> list[str]:
    if not stage.dataset_weights or is_exact(stage.dataset_weights, integers):
        return []
    shown = integers.tolist() if len(integers) <= 16 else [*integers[:16].tolist(), "..."]
    return [f"Note: weights are rounded to {', '.join(map(str, shown))} of {int(integers.sum())}"]
