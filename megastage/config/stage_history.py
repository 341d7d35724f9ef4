"""Stages across a resume: what is saved of them, and what may have been edited since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megastage.config.errors import show
from megastage.config.stage import Stage

# What determines which samples a stage reads and how they are cut. Paths are not part of it: a source is its
# content, whose own fingerprint the data engine saves and compares, so that a copy elsewhere resumes.
_SAMPLE_KEYS = (
    "start_step", "dataset", "dataset_type", "dataset_weights", "dataset_random_seed",
    "seq_len", "global_batch_size", "document_mask",
)  # fmt: skip
# Frozen with the past too: the model was trained under it.
_DOCUMENT_KEYS = {"min_doc_len": 0, "long_doc_len": 0, "long_doc_share": None}  # with what it means not to be saved
# The name too: positions in the data, consumed samples and every record so far are kept under it.
_PAST_KEYS = ("name", *_SAMPLE_KEYS, *_DOCUMENT_KEYS, "rope")
_FREE_KEYS = (
    "dataset_path", "dataset_folders", "local_batch_size", "context_parallel_degree", "recompute",
    "lr", "lr_end", "lr_decay_type", "lr_warmup_steps", "weight_decay", "reset_optimizer",
)  # fmt: skip


def record(stage: Stage) -> dict[str, Any]:
    """What a checkpoint saves of a stage: plain JSON values, weights as shares."""
    saved = asdict(stage)
    for name in ("inherited", "notes", "data_ranks", "micro_batch_size", "micro_batches"):
        del saved[name]
    saved["dataset_weights"] = stage.shares
    saved["fingerprint"] = fingerprint(stage)
    return dict(json.loads(json.dumps(saved)))


def fingerprint(stage: Stage) -> str:
    """Hex digest of everything in the configuration that determines which samples are read, in which order, how."""
    facts = {name: getattr(stage, name) for name in _SAMPLE_KEYS} | {"dataset_weights": stage.shares}
    facts |= {name: getattr(stage, name) for name, off in _DOCUMENT_KEYS.items() if getattr(stage, name) != off}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def compare(saved: Sequence[Mapping[str, Any]], stages: Sequence[Stage], step: int) -> tuple[list[str], list[str]]:
    """Saved stages (`record`s) against the present ones, for a run that goes on after `step` completed updates.

    Returns (problems, diffs): problems are edits of what was already trained on, and forbid going on; diffs are
    edits of the future or of what doesn't touch the samples, to be printed. The stage that update step - 1 belongs
    to may be ended or prolonged, but no earlier than `step`.
    """
    problems: list[str] = []
    diffs: list[str] = []
    now = [record(stage) for stage in stages]
    saved = [{**_DOCUMENT_KEYS, **entry} for entry in saved]
    begun = [entry for entry in saved if entry["start_step"] < step and not entry["never_runs"]]
    for index, old in enumerate(begun):
        new = now[index] if index < len(now) else None
        if new is None or new["start_step"] >= step:
            problems.append(
                f"stage {old['name']!r} (from step {old['start_step']}) was trained on and is gone from the "
                "configuration; put it back"
            )
            continue
        _compare_begun(old, new, step, problems, diffs)
    for new in now[len(begun) :]:
        if new["start_step"] < step:
            problems.append(
                f"stage {new['name']!r}: start_step = {new['start_step']} lies in the past, {step} steps are done; "
                f"let it start at {step} or later"
            )
    _compare_future([dict(e) for e in saved[len(begun) :]], now[len(begun) :], diffs)
    return problems, diffs


def _compare_begun(
    old: Mapping[str, Any], new: Mapping[str, Any], step: int, problems: list[str], diffs: list[str]
) -> None:
    """A stage that has begun: its samples are frozen, and its end where that has passed."""
    where = f"stage {old['name']!r}"
    for key in _PAST_KEYS:
        if old[key] != new[key]:
            problems.append(
                f"{where}: {key} was {_show(old[key])} and is {_show(new[key])}, but the stage has begun; "
                f"set it back, or end the stage at step {step} and put the change in a new one"
            )
    if len(old["dataset_folders"]) != len(new["dataset_folders"]):
        problems.append(
            f"{where}: dataset_folders had {len(old['dataset_folders'])} folders and has "
            f"{len(new['dataset_folders'])}, but the stage has begun; set it back"
        )
    ended = old["end_step"] < step
    if ended and old["end_step"] != new["end_step"]:
        problems.append(
            f"{where}: end_step was {old['end_step']} and is {new['end_step']}, but {step} steps are done; set it back"
        )
    elif not ended and new["end_step"] < step:
        problems.append(f"{where}: end_step = {new['end_step']}, but {step} steps are done; end it at {step} or later")
    elif old["end_step"] != new["end_step"]:
        diffs.append(f"{where}: end_step {old['end_step']} -> {new['end_step']}")
    diffs += _differences(where, old, new, _FREE_KEYS)


def _compare_future(old: list[dict[str, Any]], new: list[dict[str, Any]], diffs: list[str]) -> None:
    """Stages that have not begun, matched by name: everything about them may change."""
    before = {entry["name"]: entry for entry in old}
    after = {entry["name"]: entry for entry in new}
    for name, entry in after.items():
        if name in before:
            diffs += _differences(f"stage {name!r}", before[name], entry, (*_PAST_KEYS, "end_step", *_FREE_KEYS))
        else:
            diffs.append(f"stage {name!r}: new, from step {entry['start_step']}")
    diffs += [f"stage {name!r}: gone" for name in before if name not in after]


def _differences(where: str, old: Mapping[str, Any], new: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [f"{where}: {key} {_show(old[key])} -> {_show(new[key])}" for key in keys if old[key] != new[key]]


def _show(value: Any) -> str:
    return "unset" if value is None else show(value)
