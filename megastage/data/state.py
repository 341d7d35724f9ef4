"""Where a run stands in its data: a few integers per stage and source, as JSON, the same on every rank and layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megastage.data.doc_rule import rule_of
from megastage.data.index import DataIndex, DataStage
from megastage.data.live_streams import LiveOrder
from megastage.data.order import Visit

VERSION = 1
_RULE = ("min_doc_len", "long_doc_len", "long_doc_share")


@dataclass
class StageRecord:
    """What one stage consumed, and all that decided which samples these were.

    samples: rows of the global order handed out; sources: fingerprints in hex; weights: integer weights; marks: by
    order key, where the stage's rows of that source ended (see `Visit.mark`); min_doc_len, long_doc_len,
    long_doc_share: as `DocRule`, left out of the saved form where all documents are read alike. For people alone, by
    source: about how many epochs of it were used by the end, and the tokens that entering skipped (None: not drawn, or
    not known).
    """

    index: int
    name: str
    seq_len: int
    seed: int
    document_mask: bool
    sources: list[str]
    weights: list[int]
    samples: int = 0
    marks: dict[str, list[int]] = field(default_factory=dict)
    min_doc_len: int = 0
    long_doc_len: int = 0
    long_doc_share: float | None = None
    epochs: list[float | None] = field(default_factory=list)
    skipped_tokens: list[int | None] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """The order key of each source."""
        return [f"{fingerprint}:{self.seed}" for fingerprint in self.sources]


def record_of(stage: DataStage, index: DataIndex) -> StageRecord:
    """A fresh record of a stage that begins."""
    mine, rule = index.stages[stage.index], rule_of(stage)
    return StageRecord(
        index=stage.index,
        name=stage.name,
        seq_len=stage.seq_len,
        seed=stage.dataset_random_seed,
        document_mask=stage.document_mask,
        sources=[source.fingerprint.hex() for source in mine.sources],
        weights=mine.weights.tolist(),
        **({} if rule is None else rule._asdict()),
    )


def histories(records: Sequence[StageRecord], index: DataIndex) -> dict[str, list[Visit]]:
    """By order key, its visits in these records; neighbours of one length and rule count as one."""
    found: dict[str, list[Visit]] = {}
    for record in records:
        counts, rule = index.stages[record.index].table.counts_at(record.samples).tolist(), rule_of(record)
        for key, rows in zip(record.keys, counts):
            visits, visit = found.setdefault(key, []), Visit(record.seq_len, rows, record.marks.get(key), rule)
            if rows and visits and visits[-1].same_rows(visit):
                # the later mark counts from the beginning of the joined visit
                visits[-1] = visit._replace(rows=visits[-1].rows + rows)
            elif rows:
                visits.append(visit)
    return found


def note_epochs(records: Sequence[StageRecord], index: DataIndex) -> None:
    """Put into the last record how many epochs of its sources it and all before it make, as the plan counts them.

    None for text that is read as it comes, whose size ranks may know differently well.
    """
    if not records:
        return
    visits, last = histories(records, index), records[-1]
    orders = [index.orders.get(key) for key in last.keys]  # none where the weight is 0
    last.epochs = [
        None if order is None or isinstance(order, LiveOrder) else round(order.planned_epochs(visits.get(key, [])), 6)
        for key, order in zip(last.keys, orders, strict=True)
    ]


def to_json(records: Sequence[StageRecord], index: DataIndex) -> dict[str, Any]:
    """The saved form: records of the visited stages, and the settings of the orders that they used."""
    used = {key for record in records for key in record.keys}
    return {
        "version": VERSION,
        "stages": [_saved_form(record) for record in records],
        "orders": {key: order.settings() for key, order in sorted(index.orders.items()) if key in used},
    }


def _saved_form(record: StageRecord) -> dict[str, Any]:
    saved = asdict(record)
    if rule_of(record) is None:
        for name in _RULE:
            del saved[name]
    return saved


def from_json(state: Mapping[str, Any]) -> tuple[list[StageRecord], dict[str, Any]]:
    """Records and order settings of a saved state. Raises ValueError when it is not of this version or damaged."""
    if state.get("version") != VERSION:
        raise ValueError(f"dataloader_state: version {state.get('version')!r}, this program reads version {VERSION}")
    try:
        return [StageRecord(**record) for record in state["stages"]], dict(state["orders"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"dataloader_state: not readable ({error!r}); resume from another checkpoint") from None


def check_frozen(records: Sequence[StageRecord], stages: Sequence[DataStage], index: DataIndex) -> None:
    """The past must be what it was. Raises ValueError that names every changed field with both values."""
    problems = []
    by_number = {stage.index: stage for stage in stages}
    for record in records:
        stage = by_number.get(record.index)
        title = f"stage {record.index + 1} {record.name!r}"
        if stage is None or record.index not in index.stages:
            problems.append(f"{title}: has been read from, but is no longer among the stages that run")
            continue
        now = record_of(stage, index)
        for name in ("name", "seq_len", "seed", "document_mask", "weights", *_RULE):
            before, after = getattr(record, name), getattr(now, name)
            if before != after:
                label = {"seed": "dataset_random_seed", "weights": "dataset_weights (as integers)"}.get(name, name)
                problems.append(f"{title}: {label} was {before!r} in the checkpoint and is {after!r} now")
        problems.extend(f"{title}: {problem}" for problem in _changed_sources(record, now, index, stage.index))
    if problems:
        raise ValueError(
            "the data of past stages must not change in a resumed run:\n  - "
            + "\n  - ".join(problems)
            + "\nrestore these values, or start a new run from the checkpoint's weights"
        )


def _changed_sources(record: StageRecord, now: StageRecord, index: DataIndex, number: int) -> list[str]:
    if len(record.sources) != len(now.sources):
        return [f"had {len(record.sources)} sources in the checkpoint and has {len(now.sources)} now"]
    text = any(kind == "huggingface" for kind, _ in index.stages[number].specs)
    hint = "; text is another one too when training.live_text_mb makes it be tokenized at another time" if text else ""
    return [
        f"source {i + 1} ({index.stages[number].specs[i][1]}) had the content {before} in the checkpoint "
        f"and has {after} now{hint}"
        for i, (before, after) in enumerate(zip(record.sources, now.sources))
        if before != after
    ]
