"""From step to step: the stages in order, their ends made explicit and cut to the length of the run."""

from __future__ import annotations

from dataclasses import dataclass

from megastage.config.errors import show
from megastage.config.schema import Config, DataStage


@dataclass(frozen=True)
class Span:
    """One stage's place in the run. `table` is None for the stage that takes everything from [training]."""

    path: str
    table: DataStage | None
    name: str
    start_step: int
    end_step: int
    declared_end_step: int | None
    never_runs: bool
    notes: tuple[str, ...]


def resolve_spans(cfg: Config, problems: list[str]) -> list[Span]:
    """The stages sorted by start. Appends to `problems`: names, starts, gaps, overlaps, an early end."""
    steps = cfg.training.steps
    written = cfg.training.data_stages
    if not written:
        return [Span("training", None, "default", 0, steps, None, False, ())]
    entries = [(f"training.data_stages[{index}]", table) for index, table in enumerate(written)]
    _check_names(entries, problems)
    for path, table in entries:
        if table.start_step < 0:
            problems.append(f"{path}.start_step = {table.start_step}: must be at least 0{_of(table)}")
        if table.end_step is not None and table.end_step <= table.start_step:
            problems.append(
                f"{path}.end_step = {table.end_step}: must be greater than start_step = {table.start_step} "
                f"(end_step is exclusive){_of(table)}"
            )
    entries.sort(key=lambda entry: entry[1].start_step)
    spans = _front(entries[0][1], steps)
    for position, (path, table) in enumerate(entries):
        following = entries[position + 1] if position + 1 < len(entries) else None
        end = _end(path, table, following, steps, problems)
        never_runs = table.start_step >= steps
        notes: tuple[str, ...] = ()
        if not never_runs and end is not None and end > steps:
            notes = (f"end_step {end:,} is cut to training.steps = {steps:,}",)
        cut = max(table.start_step, steps if end is None else min(end, steps))
        spans.append(Span(path, table, table.name, table.start_step, cut, end, never_runs, notes))
    return spans


def _front(first: DataStage, steps: int) -> list[Span]:
    """The stage `default` that fills the steps before the first one, if there are any."""
    if first.start_step <= 0:
        return []
    note = f"takes everything from [training]: the first stage starts at step {first.start_step:,}"
    end = min(first.start_step, steps)
    return [Span("training", None, "default", 0, end, first.start_step, False, (note,))]


def _end(
    path: str, table: DataStage, following: tuple[str, DataStage] | None, steps: int, problems: list[str]
) -> int | None:
    """end_step made explicit, None for an open last stage. Appends what doesn't fit the next stage or the run's end."""
    if following is None:
        if table.end_step is not None and table.start_step < steps and table.end_step < steps:
            problems.append(
                f"{path}.end_step = {table.end_step}: the last stage ends before training.steps = {steps}; "
                f"leave end_step out or set it to {steps}{_of(table)}"
            )
        return table.end_step
    next_path, next_table = following
    next_start = next_table.start_step
    if next_start == table.start_step:
        problems.append(
            f"{path}.start_step and {next_path}.start_step = {next_start}: "
            f"stages {table.name!r} and {next_table.name!r} start together; give each its own start_step"
        )
    elif table.end_step is not None and table.end_step != next_start:
        what = "a gap" if table.end_step < next_start else "an overlap"
        problems.append(
            f"{path}.end_step = {table.end_step}: {what} before stage {next_table.name!r}, which starts at "
            f"{next_path}.start_step = {next_start}; make them equal, or leave end_step out{_of(table)}"
        )
    return next_start


def _check_names(entries: list[tuple[str, DataStage]], problems: list[str]) -> None:
    seen: dict[str, str] = {}
    if min(table.start_step for _, table in entries) > 0:
        seen["default"] = "the stage that fills the steps before the first one"
    for path, table in entries:
        if not table.name.strip():
            problems.append(f"{path}.name = {show(table.name)}: is empty; every stage needs a name of its own")
        elif table.name in seen:
            problems.append(f"{path}.name = {show(table.name)}: already the name of {seen[table.name]}; choose another")
        elif not table.name.isprintable():
            problems.append(f"{path}.name = {table.name!r}: holds characters that can't be printed on one line")
        seen.setdefault(table.name, path)


def _of(table: DataStage) -> str:
    return f" (stage {table.name!r})"
