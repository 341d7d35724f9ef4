"""The checkpoint manager of a run: saves, keeps, finds and loads checkpoints; safe against kills at any moment."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megastage.checkpoint import folders
from megastage.checkpoint.agreement import Ranks
from megastage.checkpoint.errors import BadCheckpoint, CheckpointFailed
from megastage.checkpoint.loading import load_folder, verify_folder
from megastage.checkpoint.manifest import check_sizes, read_manifest, read_train_state
from megastage.checkpoint.planner import name_matcher, plan_shards
from megastage.checkpoint.saving import SaveJob, Saver
from megastage.checkpoint.staging import Stager

logger = logging.getLogger(__name__)

ASYNC_MODES = ("disabled", "async", "async_with_pinned_mem")
HELD_FOLDER_PATIENCE_S = 5.0  # a killed run that this one replaces may take a while to be gone
SHARED_FOLDER_PATIENCE_S = 10.0  # network file systems show a new file to other nodes after a while


class CheckpointManager:
    """Checkpoints of one run in one folder, which all nodes must share.

    folder: made if missing. group: a gloo group of all ranks that nothing else uses (a save in the background runs its
    collectives on it), or None for a single process. keep_latest_k: 0 keeps all. async_mode: "disabled", "async"
    (copy to host memory, write in a thread) or "async_with_pinned_mem" (the same through page-locked memory).
    check_replicas: compare what several ranks hold a copy of, and fail the save where it differs.
    hold: until `close`, refuse the folder to every other run that holds it too. load_only: write nothing there at all,
    since another run may be writing; a damaged newest checkpoint is an error then.

    Every method is collective: all ranks call it, in the same order, from the training thread.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        group: dist.ProcessGroup | None = None,
        keep_latest_k: int = 10,
        async_mode: str = "disabled",
        check_replicas: bool = True,
        files_per_rank: int = 1,
        hold: bool = False,
        load_only: bool = False,
    ) -> None:
        if async_mode not in ASYNC_MODES:
            raise ValueError(f"checkpoint.async_mode = {async_mode!r}: choose one of {', '.join(ASYNC_MODES)}")
        if keep_latest_k < 0:
            raise ValueError(f"checkpoint.keep_latest_k = {keep_latest_k}: give 0 (keep all) or a positive number")
        self.root = Path(folder).absolute()
        self.keep_latest_k = keep_latest_k
        self.async_mode = async_mode
        self.ranks = Ranks(group)
        self.last_stall_s = 0.0  # how long the last save held up training
        self._saver = Saver(self.root, self.ranks, check_replicas=check_replicas, files_per_rank=files_per_rank)
        self._stager = Stager(pinned=async_mode == "async_with_pinned_mem")
        self._thread: threading.Thread | None = None
        self._outcome: BaseException | None = None
        self._resumed_from: int | None = -1  # later checkpoints are superseded at the first save; None: done
        self._held: int | None = None
        self._told: set[int] = set()  # steps whose checkpoint was said to hold the model only
        self._load_only = load_only
        if not load_only:
            self._open_for_writing(hold)

    def _open_for_writing(self, hold: bool) -> None:
        self._main_only(lambda: self.root.mkdir(parents=True, exist_ok=True))
        if hold:
            self._main_only(self._hold)
        check_shared(self.root, self.ranks)
        for note in self._main_only(lambda: folders.recover(self.root)):
            if self.ranks.is_main:
                logger.warning("checkpoint folder %s: %s", self.root, note)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        train_state: dict[str, Any],
        *,
        model_only: bool = False,
        export_dtype: torch.dtype | None = None,
    ) -> None:
        """Save after `step` completed updates. Waits for a save still in flight and raises its failure first.

        tensors: flat, plain tensors or DTensors; a key may live on some ranks only. train_state: JSON; rank 0's is
        saved. model_only keeps only keys below `model` (optionally cast to export_dtype); no run resumes from that.
        With async_mode the tensors may be changed as soon as this returns.

        Raises CheckpointFailed on every rank when any rank cannot save.
        """
        self.wait()
        start = time.perf_counter()
        job = SaveJob(step, "model" if model_only else "full")
        try:
            if step < 0:
                raise ValueError(f"step {step}: a checkpoint counts completed updates")
            if model_only:
                is_model = name_matcher(["model"])
                tensors = {
                    key: value.to(export_dtype or value.dtype) for key, value in tensors.items() if is_model(key)
                }
            job.train_state = _to_json(train_state) if self.ranks.is_main else b"{}"
            job.items, job.shards = plan_shards(tensors)
            if self.async_mode != "disabled":
                job.shards = self._stager.stage(job.shards)
        except Exception as error:
            job.error = error
        if self.async_mode == "disabled":
            self._carry_out(job)
            self.last_stall_s = time.perf_counter() - start
            self._raise_outcome()
        else:
            # A daemon: at a crash of the training thread the process must not hang in a collective of dead ranks.
            self._thread = threading.Thread(target=self._carry_out, args=(job,), name=f"save-step-{step}", daemon=True)
            self._thread.start()
            self.last_stall_s = time.perf_counter() - start

    def wait(self) -> None:
        """Block until the save in flight is over; raises its failure (CheckpointFailed) on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_outcome()

    def close(self) -> None:
        """Finish: wait for the save in flight and raise its failure; let go of the folder."""
        try:
            self.wait()
        finally:
            if self._held is not None:
                os.close(self._held)
                self._held = None

    def latest_good(self, load_step: int = -1) -> int | None:
        """The newest step that a run can resume from, judged by manifest, train state and file sizes; None if none.

        Damaged ones on the way are renamed step-N.bad-K. With load_step >= 0 only that one is looked at: ValueError if
        it does not exist, BadCheckpoint if it is damaged. The tensors' bytes are verified by `load`.

        Raises CheckpointFailed when there are damaged checkpoints but no good one: a run must not silently start from
        scratch.
        """
        self.wait()
        if load_step >= 0:
            self._main_only(lambda: self._require(load_step))
            return load_step
        return self._main_only(self._newest)

    def train_state(self, step: int) -> dict[str, Any]:
        """The verified train state of step-N, without its tensors."""
        self.wait()
        folder = folders.step_folder(self.root, step)
        return self._main_only(lambda: read_train_state(folder, read_manifest(folder)))

    def load(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        *,
        only: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Fill `tensors` in place from step-N, on any layout, verifying every byte; returns the train state.

        See `load_folder` for strictness, `only` and `exclude`. Raises BadCheckpoint naming file and tensor.
        """
        self.wait()
        folder = folders.step_folder(self.root, step)
        state = load_folder(folder, tensors, self.ranks, only=only, exclude=exclude)
        self._resumed_from = step
        return state

    def load_newest(
        self,
        tensors: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]],
        load_step: int = -1,
        *,
        exclude: Iterable[str] = (),
    ) -> tuple[int, dict[str, Any]] | None:
        """Load the newest checkpoint whose every byte is right; (step, train state), or None in a fresh folder.

        Bad ones are reported, renamed step-N.bad-K, and the next older is tried. With load_step >= 0 only that one is
        tried. Raises as `latest_good` does.
        """
        wanted = tensors() if callable(tensors) else tensors
        exclude = tuple(exclude)
        while True:
            step = self.latest_good(load_step)
            if step is None:
                return None
            try:
                return step, self.load(step, wanted, exclude=exclude)
            except BadCheckpoint as error:
                if load_step >= 0 or self._load_only:
                    raise
                self.mark_bad(step, error)

    def mark_bad(self, step: int, reason: BaseException) -> None:
        """Rename step-N to step-N.bad-K, so that nothing loads it again."""
        self._main_only(lambda: self._set_bad(step, reason))

    def supersede_later(self, step: int) -> None:
        """Rename checkpoints after `step` to step-N.superseded-K: training now goes another way from `step`.

        The first save after a load does this by itself; a trainer calls it before it goes on from a rewind.
        """
        self.wait()
        self._resumed_from = step
        self._main_only(self._supersede)
        self._resumed_from = None

    def verify(self, step: int) -> None:
        """Verify every byte of step-N without loading it. Raises BadCheckpoint naming file and tensor."""
        self.wait()
        verify_folder(folders.step_folder(self.root, step), self.ranks)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints in the folder, oldest first."""
        return self._main_only(lambda: folders.complete_steps(self.root))

    def _carry_out(self, job: SaveJob) -> None:
        """Save and prune; in async modes this is the background thread."""
        try:
            self._stager.wait()
            self._saver.save(job, lambda: self._make_way(job.step))
            if self.ranks.is_main and job.contents == "full":
                self._prune(job.step)
        except CheckpointFailed as error:
            self._outcome = CheckpointFailed(f"checkpoint step-{job.step} was not saved: {error}")
            self._outcome.__cause__ = error.__cause__
        except BaseException as error:
            text = f"checkpoint step-{job.step} was not saved: rank {self.ranks.rank}: {type(error).__name__}: {error}"
            self._outcome = CheckpointFailed(text)
            self._outcome.__cause__ = error

    def _hold(self) -> None:
        self._held = folders.hold(self.root, HELD_FOLDER_PATIENCE_S)

    def _raise_outcome(self) -> None:
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            raise outcome

    def _make_way(self, step: int) -> None:
        """Before step-N gets its name: set aside what would be overwritten or belongs to an abandoned future."""
        self._supersede()
        if folders.step_folder(self.root, step).exists():
            folders.set_aside(self.root, step, "superseded")

    def _supersede(self) -> None:
        if self._resumed_from is not None:
            for later in [s for s in folders.complete_steps(self.root) if s > self._resumed_from]:
                target = folders.set_aside(self.root, later, "superseded")
                logger.warning(
                    "training goes on from step %d: step-%d is now %s", self._resumed_from, later, target.name
                )
            self._resumed_from = None
            folders.repoint_latest(self.root)

    def _prune(self, step: int) -> None:
        try:
            folders.prune(self.root, self.keep_latest_k, step)
        except OSError as error:  # the new checkpoint is safe; old ones can go another time
            logger.warning("old checkpoints in %s could not be removed: %s", self.root, error)

    def _newest(self) -> int | None:
        for step in reversed(folders.complete_steps(self.root)):
            try:
                if self._check(step) == "full":
                    return step
                if step not in self._told:
                    logger.warning("step-%d holds the model only: not a checkpoint to resume from", step)
                    self._told.add(step)
            except BadCheckpoint as error:
                if self._load_only:
                    raise
                self._set_bad(step, error)
        self._refuse_if_all_bad()
        return None

    def _check(self, step: int) -> str:
        folder = folders.step_folder(self.root, step)
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
        read_train_state(folder, manifest)
        if manifest.step != step:
            raise BadCheckpoint(f"{folder}: its manifest is of step {manifest.step}", file=str(folder))
        return manifest.contents

    def _require(self, step: int) -> None:
        present = folders.complete_steps(self.root)
        if step not in present:
            raise ValueError(f"checkpoint.load_step = {step}: {self.root} has steps {present or 'none'}")
        if self._check(step) != "full":
            raise ValueError(
                f"checkpoint.load_step = {step}: that one holds the model only; take another of {present}, or begin a "
                "new run from it with initial_load_path"
            )

    def _set_bad(self, step: int, reason: BaseException) -> None:
        target = folders.set_aside(self.root, step, "bad")
        folders.repoint_latest(self.root)
        logger.error("checkpoint step-%d is damaged and now named %s: %s", step, target.name, reason)

    def _refuse_if_all_bad(self) -> None:
        bad = [path.name for path in folders.aside(self.root, "bad")]
        if bad:
            raise CheckpointFailed(
                f"{self.root}: no good checkpoint is left, only {', '.join(bad)}; "
                "to start from scratch move them away, to go on bring back a good one"
            )

    def _main_only(self, action: Callable[[], Any]) -> Any:
        """Do `action` on rank 0 and return its (JSON) result on every rank, or raise its error on every rank."""
        result, error = None, None
        if self.ranks.is_main:
            try:
                result = action()
            except Exception as caught:
                error = caught
        self.ranks.agree(error)
        return self.ranks.broadcast(result)


def check_shared(root: Path, ranks: Ranks) -> None:
    """Prove that every rank sees, and may write to, the folder that rank 0 sees. Collective.

    Rank 0 leaves a nonce; each rank must find it and be able to make a file of its own. Raises CheckpointFailed.
    """
    nonce = ranks.broadcast(secrets.token_hex(16) if ranks.is_main else None)
    mark = root / f".shared-{nonce}"
    own = root / f".shared-{nonce}-{ranks.rank}"
    error: BaseException | None = None
    try:
        if ranks.is_main:
            mark.touch()
    except OSError as caught:
        error = caught
    ranks.agree(error)
    try:
        deadline = time.monotonic() + SHARED_FOLDER_PATIENCE_S
        while not mark.exists():
            if time.monotonic() > deadline:
                raise CheckpointFailed(
                    f"checkpoint folder {root} is not shared: {socket.gethostname()} does not see what rank 0 wrote "
                    "there; give a folder on a file system that all nodes mount"
                )
            time.sleep(0.1)
        own.touch(exist_ok=False)
        own.unlink()
    except Exception as caught:
        error = caught
    try:
        ranks.agree(error)
    finally:
        if ranks.is_main:
            mark.unlink(missing_ok=True)


def _to_json(train_state: dict[str, Any]) -> bytes:
    """JSON that reads back exactly: no NaN (not JSON), no keys but strings (JSON would turn 1 into "1")."""
    _check_keys(train_state, "train state")
    return (json.dumps(train_state, allow_nan=False, indent=1) + "\n").encode()


def _check_keys(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r} is not a string")
            _check_keys(entry, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            _check_keys(entry, f"{where}[{i}]")
