"""Data stages: resolve them, look one up by step, tell two apart, show the plan. Pure: no torch, no files.

A stage is a span of steps with its own data mixture, sequence length and whatever else it names;
`resolve_stages` turns [[training.data_stages]] into `Stage`s with everything inherited filled in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megastage.config.stage import Stage, lookup
from megastage.config.stage_history import compare, fingerprint, record
from megastage.config.stage_resolve import resolve_stages

__all__ = [
    "Change",
    "Stage",
    "changes",
    "compare",
    "fingerprint",
    "lookup",
    "plan_text",
    "record",
    "resolve_stages",
    "stage_notes",
    "transition_text",
]

_RULE = "=" * 60

# In the order of the documented field table, then the keys beyond it.
_FIELDS: tuple[tuple[str, Callable[[Stage], Any]], ...] = (
    ("dataset", lambda s: s.dataset),
    ("dataset_path", lambda s: s.dataset_path),
    ("dataset_type", lambda s: s.dataset_type),
    ("dataset_folders", lambda s: s.dataset_folders),
    ("dataset_weights", lambda s: s.shares),
    ("dataset_random_seed", lambda s: s.dataset_random_seed),
    ("seq_len", lambda s: s.seq_len),
    ("local_batch_size", lambda s: s.local_batch_size),
    ("global_batch_size", lambda s: s.global_batch_size),
    ("rope_theta", lambda s: s.rope.theta),
    ("rope_scaling", lambda s: s.rope.scaling),
    ("context_parallel_degree", lambda s: s.context_parallel_degree),
    ("document_mask", lambda s: s.document_mask),
    ("recompute_mode", lambda s: s.recompute[0]),
    ("recompute_option", lambda s: s.recompute[1] if s.recompute[0] == "selective" else None),
)

# What a silent stage leaves as it was: a change only where the new stage sets it.
_EVENTS = ("lr", "lr_end", "lr_decay_type", "lr_warmup_steps", "weight_decay", "reset_optimizer")

_DOCUMENT_FIELDS = ("min_doc_len", "long_doc_len", "long_doc_share")


@dataclass(frozen=True)
class Change:
    """One key that differs between two stages, with both values."""

    field: str
    old: Any
    new: Any


def changes(old: Stage, new: Stage) -> list[Change]:
    """What a run notices when it goes from `old` to `new`, in the order of the field table."""
    found = [Change(name, get(old), get(new)) for name, get in _FIELDS if get(old) != get(new)]
    events = [Change(name, getattr(old, name), getattr(new, name)) for name in _EVENTS]
    found += [event for event in events if event.new is not None and event.new is not False]
    documents = [Change(name, getattr(old, name), getattr(new, name)) for name in _DOCUMENT_FIELDS]
    return found + [change for change in documents if change.old != change.new]


def plan_text(stages: Sequence[Stage], extra_lines: Callable[[Stage], list[str]] | None = None) -> str:
    """The stage plan logged at training start, without a final newline.

    extra_lines: what follows a stage's own lines, indented like them; None: `stage_notes`.
    """
    more = stage_notes if extra_lines is None else extra_lines
    lines = [_RULE, "DATA STAGE TRAINING PLAN", _RULE, f"Total stages: {len(stages)}"]
    for stage in stages:
        lines += ["", f"Stage {stage.index + 1}: {stage.name}", *(f"  {line}" for line in _plan_lines(stage))]
        lines += [f"  {line}" for line in more(stage)]
    return "\n".join([*lines, _RULE])


def _plan_lines(stage: Stage) -> list[str]:
    """The lines of one stage; one about a key that the stage makes no use of is left out.

    The documented lines come first, in fixed words ("1 steps" too): they are what programs read.
    """
    if stage.never_runs:
        end = "end" if stage.declared_end_step is None else f"{stage.declared_end_step:,}"
        span = f"{stage.start_step:,} -> {end} (never runs)"
    else:
        span = f"{stage.start_step:,} -> {stage.end_step:,} ({stage.steps:,} steps)"
    lines = [f"Steps: {span}", f"Estimated tokens: {stage.tokens / 1e9:.2f}B tokens"]
    lines.append(f"Dataset type: {stage.dataset_type}")
    if stage.dataset_folders:
        lines.append(f"Dataset folders: {len(stage.dataset_folders)} folders")
        lines.append(f"Weights: {_shares(stage.shares)}")
    lines.append(f"Sequence length: {stage.seq_len}")
    if stage.dataset is not None:
        lines.append(f"Dataset: {stage.dataset}")
    if stage.dataset_path is not None:
        lines.append(f"Dataset path: {stage.dataset_path}")
    return lines


def stage_notes(stage: Stage) -> list[str]:
    """Lines that go after a stage's own in the plan: batch, and what the user should know."""
    ranks = f"{stage.data_ranks} data rank{'' if stage.data_ranks == 1 else 's'}"
    batch = f"{stage.global_batch_size:,} rows = {ranks} x {stage.micro_batches} micro-batches of"
    tokens = f"Tokens per step: {stage.tokens_per_step:,} ({batch} {stage.micro_batch_size})"
    attention = (
        "Attention: within documents, where positions restart (document_mask = true; older trainers have false)"
        if stage.document_mask
        else "Attention: over whole rows (document_mask = false)"
    )
    return [tokens, attention, *_documents(stage), *(f"Note: {note}" for note in stage.notes)]


def _documents(stage: Stage) -> list[str]:
    """A line on which documents are read, where not all are read alike."""
    parts = [f"at least {stage.min_doc_len:,} tokens"] if stage.min_doc_len else []
    if stage.long_doc_share is not None:
        parts.append(f"{stage.long_doc_share:.4g} of the rows of those of at least {stage.long_doc_len:,}")
    return [f"Documents: {', '.join(parts)}"] if parts else []


def transition_text(step: int, old: Stage, new: Stage) -> str:
    """The block logged when update `step` is the first of `new`, without a final newline."""
    found = changes(old, new)
    names = ", ".join(change.field for change in found) or "none"
    lines = [_RULE, "DATA STAGE TRANSITION", _RULE, f"Step {step}: '{old.name}' -> '{new.name}'", f"Changes: {names}"]
    return "\n".join([*lines, *(_change_line(change) for change in found), _RULE])


def _change_line(change: Change) -> str:
    if change.field == "dataset_weights":
        return f"New weights: {_shares(change.new)}"
    if change.field == "dataset_folders":
        return f"New dataset_folders: {json.dumps(list(change.new))}"
    if change.field in _EVENTS:
        return f"New {change.field}: {_plain(change.new)}"
    return f"New {change.field}: {_plain(change.old)} -> {_plain(change.new)}"


def _shares(shares: Sequence[float]) -> str:
    return "[" + ", ".join(f"{share:.3f}" for share in shares) + "]"


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.12g}"
    if hasattr(value, "kind"):
        return f"{value.kind} x{value.factor:g}"
    return str(value)
