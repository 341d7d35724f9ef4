"""Which data a stage reads: inheritance from [training], and the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megastage.config.errors import show
from megastage.config.schema import Config, DataStage, Training

# The types that `dataset`, a name, means something to. Every type takes dataset_path or dataset_folders.
_NAMED = ("huggingface",)
# The type that takes dataset_folders where [training] sets both folders and path for stages of several types.
_FOLDERS_FIRST = ("nanoset",)


@dataclass(frozen=True)
class DataChoice:
    """The data keys of a stage with inheritance done, and what to tell the user about them."""

    dataset: str | None
    dataset_path: str | None
    dataset_type: str
    dataset_folders: tuple[str, ...]
    dataset_weights: tuple[float, ...]
    notes: tuple[str, ...]


def choose_data(cfg: Config, table: DataStage | None, path: str, problems: list[str]) -> DataChoice:
    """What the stage `table` at key `path` reads; None: a stage that takes everything from [training].

    Appends to `problems`. The result is usable for further checks even when there are some.
    """
    base = cfg.training
    own = table if table is not None else DataStage(name="default", start_step=0)
    kind = own.dataset_type or base.dataset_type
    notes: list[str] = []
    if own.dataset is not None and kind not in _NAMED:
        problems.append(
            f'{path}.dataset = {show(own.dataset)}: dataset_type "{kind}" takes no dataset name; '
            "use dataset_path or dataset_folders"
        )
    source, folders = _source(cfg, own, kind, path, notes, problems)
    weights = _weights(cfg, own, folders, path, notes, problems)
    if base.is_written("dataset") and kind not in _NAMED:
        notes.append(f'training.dataset = {show(base.dataset)} is not used by dataset_type "{kind}"')
    elif base.is_written("dataset") and folders and own.dataset is None:
        notes.append(f"training.dataset = {show(base.dataset)} is not used: the stage reads dataset_folders")
    dataset = (own.dataset or base.dataset) if kind in _NAMED and not folders else None
    return DataChoice(dataset, source, kind, folders, weights, tuple(notes))


def _source(
    cfg: Config, own: DataStage, kind: str, path: str, notes: list[str], problems: list[str]
) -> tuple[str | None, tuple[str, ...]]:
    """dataset_path or dataset_folders, whichever the stage reads."""
    base = cfg.training
    for name in ("dataset_path", "dataset"):
        if getattr(own, name) is not None and own.dataset_folders and (name == "dataset_path" or kind in _NAMED):
            problems.append(f"{path}.{name} and {path}.dataset_folders: both set; keep one of them")
    if own.dataset_path is not None:
        if base.dataset_folders:
            notes.append("training.dataset_folders is not used: the stage has a dataset_path")
        return own.dataset_path, ()
    if own.dataset_folders:
        if base.dataset_path is not None:
            notes.append("training.dataset_path is not used: the stage has dataset_folders")
        return None, own.dataset_folders
    if _is_elsewhere(own, base, kind):
        notes += [
            f"training.{name} is not used: the stage names a dataset"
            for name in ("dataset_path", "dataset_folders")
            if getattr(base, name)
        ]
        return None, ()
    if base.dataset_folders and base.dataset_path is not None:
        unused = "dataset_path" if kind in _FOLDERS_FIRST else "dataset_folders"
        notes.append(f'training.{unused} is not used: [training] has both, and this is dataset_type "{kind}"')
        return (None, base.dataset_folders) if kind in _FOLDERS_FIRST else (base.dataset_path, ())
    if not base.dataset_folders and base.dataset_path is None and kind not in _NAMED:
        problems.append(f'{path}: dataset_type "{kind}" needs data; set dataset_folders or dataset_path')
    return base.dataset_path, base.dataset_folders


def _is_elsewhere(own: DataStage, base: Training, kind: str) -> bool:
    """Whether a stage names a dataset that is not the one which the place in [training] belongs to."""
    if own.dataset is None or kind not in _NAMED:
        return False
    return not (base.is_written("dataset") and own.dataset == base.dataset)


def _weights(
    cfg: Config, own: DataStage, folders: tuple[str, ...], path: str, notes: list[str], problems: list[str]
) -> tuple[float, ...]:
    """One weight per source, as written; equal where none are."""
    inherited = not own.dataset_weights
    weights = own.dataset_weights or cfg.training.dataset_weights
    count = max(1, len(folders))
    equal = (1.0,) * count
    if not weights:
        if count > 1:
            notes.append("no dataset_weights are set: equal shares")
        return equal
    if inherited and not folders:
        if len(weights) > 1:
            notes.append("training.dataset_weights is not used: the stage reads one source")
        return equal
    owner = "training" if inherited else path
    if len(weights) != count:
        what = f"{count} dataset_folders" if folders else "one source"
        way_out = f"set dataset_weights in {path}" if inherited and path != "training" else f"give {count}"
        problems.append(
            f"{owner}.dataset_weights = {show(weights)}: {len(weights)} weights for {what} of {path}; {way_out}"
        )
        return equal
    if weight_problems(weights, f"{owner}.dataset_weights", problems):
        return equal
    total = sum(Fraction(repr(weight)) for weight in weights)
    if abs(float(total) - 1) > 1e-9:
        notes.append(f"dataset_weights sum to {float(total):g}: shown and used as shares of that")
    if inherited and own.dataset_folders:
        notes.append("dataset_weights inherited from [training]")
    return weights


def weight_problems(weights: Sequence[float], path: str, problems: list[str]) -> bool:
    """Append what is wrong with the values of `weights`; True if something is."""
    before = len(problems)
    for weight in weights:
        if math.isnan(weight) or math.isinf(weight):
            problems.append(f"{path} = {show(weights)}: {weight} is not a finite number; give a share of at least 0")
        elif weight < 0:
            problems.append(f"{path} = {show(weights)}: {weight} is negative; 0 means never drawn")
    if len(problems) == before and sum(weights) == 0:
        problems.append(f"{path} = {show(weights)}: all weights are zero; give at least one source a share")
    return len(problems) > before


def base_weight_problems(base: Training) -> list[str]:
    """What is wrong with dataset_weights of [training], also where every stage has its own."""
    problems: list[str] = []
    weights, folders = base.dataset_weights, base.dataset_folders
    if weights:
        weight_problems(weights, "training.dataset_weights", problems)
    unused = bool(base.data_stages) and all(stage.dataset_weights for stage in base.data_stages)
    if unused and weights and folders and len(weights) != len(folders):
        problems.append(
            f"training.dataset_weights = {show(weights)}: {len(weights)} weights for {len(folders)} "
            f"training.dataset_folders; give {len(folders)}, or take them out: every stage has its own"
        )
    return problems


def folder_problems(folders: Sequence[str], path: str) -> list[str]:
    """Empty and repeated entries of a list of folders."""
    problems = [f"{path}: entry {index} is empty" for index, folder in enumerate(folders) if not folder.strip()]
    seen: set[str] = set()
    for folder in folders:
        if folder in seen:
            problems.append(f"{path}: {show(folder)} is listed twice; list it once, with the sum of its weights")
        seen.add(folder)
    return problems
