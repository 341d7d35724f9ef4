"""One load as all ranks carry it out together: check that it fits, read and verify, agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megastage.checkpoint import folders
from megastage.checkpoint.agreement import Ranks
from megastage.checkpoint.errors import CheckpointFailed, CheckpointMismatch
from megastage.checkpoint.manifest import MANIFEST, TRAIN_STATE, Manifest, check_sizes, read_manifest, read_train_state
from megastage.checkpoint.planner import StrictLoadPlanner, name_matcher
from megastage.checkpoint.storage import ManifestReader

# Parts of the train state: whoever restores that leaves them out; there is no tensor behind them.
NOT_TENSORS = ("dataloader", "lr_scheduler", "train_state")


def load_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    ranks: Ranks,
    *,
    only: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    threads: int = 2,
) -> dict[str, Any]:
    """Fill `tensors` in place from the checkpoint in `folder`, verifying every byte; returns the train state.

    Collective. Strict: the ranks' keys together must be the checkpoint's, with equal dtypes and global shapes. `only`
    restricts both sides to keys at or below these names, `exclude` leaves such keys alone on both sides. On an
    exception some tensors may hold the checkpoint's values already, but never bytes that failed verification.

    Raises BadCheckpoint, CheckpointMismatch or CheckpointFailed, the same on every rank.
    """
    error: BaseException | None = None
    state: dict[str, Any] | None = None
    wanted: dict[str, Tensor] = {}
    try:
        excluded_names = [name for name in exclude if name not in NOT_TENSORS]
        selected = _selector(only, excluded_names)
        wanted = {key: value for key, value in tensors.items() if selected(key)}
        manifest = read_manifest(folder)
        state = read_train_state(folder, manifest) if ranks.is_main else None
        check_sizes(folder, manifest)
        planner = StrictLoadPlanner()
        plan = planner.plan(wanted, manifest)
    except Exception as caught:
        error = caught
    ranks.agree(error)
    ranks.agree(_check_one_manifest(folder, ranks.broadcast(manifest.digest), manifest))
    ranks.agree(_idle_names(excluded_names, tensors, manifest, ranks))
    ranks.agree(_unknown_keys(manifest, wanted, selected, ranks))
    try:
        reader = ManifestReader(folder, manifest=manifest, threads=threads)
        shards = [i for i, f in enumerate(manifest.files) if f.name != TRAIN_STATE]
        reader.verify_headers(shards[ranks.rank :: ranks.size])
        reader.read_data(planner.finish_plan(plan), planner)
    except Exception as caught:
        error = caught
    ranks.agree(error)
    return ranks.broadcast(state)


def load_initial(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    model_only: bool = True,
    exclude: Iterable[str] = (),
) -> dict[str, Any]:
    """Start a new run from another run's checkpoint (collective); returns that checkpoint's train state.

    path: a checkpoint (step-N) or a folder of them, whose newest is taken. Nothing in it is renamed or removed: a bad
    one is an error here. model_only loads only the keys below `model`.
    """
    ranks = Ranks(group)
    only = ("model",) if model_only else None
    return load_folder(_choose(path, ranks), tensors, ranks, only=only, exclude=exclude)


def initial_train_state(path: str | Path, *, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """The train state of what `load_initial` would load, without its tensors (collective)."""
    ranks = Ranks(group)
    folder = _choose(path, ranks)
    state, error = None, None
    if ranks.is_main:
        try:
            state = read_train_state(folder, read_manifest(folder))
        except Exception as caught:
            error = caught
    ranks.agree(error)
    return ranks.broadcast(state)


def _choose(path: str | Path, ranks: Ranks) -> Path:
    """A checkpoint itself, or the newest of a folder of them, as rank 0 sees it."""
    root = Path(path)
    chosen, error = None, None
    if ranks.is_main:
        if (root / MANIFEST).is_file():
            chosen = str(root)
        elif steps := folders.complete_steps(root):
            chosen = str(folders.step_folder(root, steps[-1]))
        else:
            hint = (
                "; set initial_load_in_hf = true for a Hugging Face folder" if (root / "config.json").exists() else ""
            )
            error = ValueError(
                f'checkpoint.initial_load_path = "{root}": neither a checkpoint (no {MANIFEST}) nor a folder with '
                f"step-N checkpoints{hint}"
            )
    ranks.agree(error)
    return Path(ranks.broadcast(chosen))


def verify_folder(folder: Path, ranks: Ranks) -> Manifest:
    """Compare every byte of a checkpoint with its manifest, the files divided among the ranks (collective)."""
    error: BaseException | None = None
    try:
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
        read_train_state(folder, manifest)
        shards = [i for i, f in enumerate(manifest.files) if f.name != TRAIN_STATE]
        ManifestReader(folder, manifest=manifest).verify_files(shards[ranks.rank :: ranks.size])
    except Exception as caught:
        error = caught
    ranks.agree(error)
    return manifest


def _selector(only: Iterable[str] | None, exclude: Iterable[str]) -> Callable[[str], bool]:
    """Which keys take part."""
    excluded, included = name_matcher(exclude), name_matcher(only or ())
    return lambda key: (only is None or included(key)) and not excluded(key)


def _idle_names(names: list[str], tensors: Mapping[str, Tensor], manifest: Manifest, ranks: Ranks) -> Exception | None:
    """A name that excludes nothing, on any rank or in the checkpoint, would be silently ignored: an error."""
    keys = {*tensors, *manifest.tensors}
    used = ranks.union(torch.tensor([any(map(name_matcher([n]), keys)) for n in names], dtype=torch.uint8))
    idle = [name for name, hit in zip(names, used.tolist()) if not hit]
    if not idle:
        return None
    known = ", ".join(sorted({key.split(".")[0] for key in keys} | set(NOT_TENSORS)))
    return ValueError(
        f"checkpoint.exclude_from_loading = {idle}: names nothing here; there are {known}, and keys below"
    )


def _check_one_manifest(folder: Path, digest_of_main: str, manifest: Manifest) -> BaseException | None:
    if manifest.digest == digest_of_main:
        return None
    return CheckpointFailed(f"{folder / MANIFEST} is not the file that rank 0 sees: is the folder shared by all nodes?")


def _unknown_keys(
    manifest: Manifest, wanted: Mapping[str, Tensor], selected: Callable[[str], bool], ranks: Ranks
) -> BaseException | None:
    """Keys of the checkpoint that no rank asked for (each pipeline rank asks for its own layers only)."""
    keys = [key for key in sorted(manifest.tensors) if selected(key)]
    asked = ranks.union(torch.tensor([key in wanted for key in keys], dtype=torch.uint8))
    problems = []
    for key, seen in zip(keys, asked.tolist()):
        if not seen:
            tensor = manifest.tensors[key]
            problems.append(f"{key}: unknown to the run (the checkpoint has {tensor.dtype} {tensor.shape})")
    return CheckpointMismatch("\n".join(problems), problems) if problems else None
