"""One save as all ranks carry it out together: plan, write, agree, commit.

Every rank takes part in every collective whatever happened to it before, and brings its failure along; so an I/O error
on one rank ends the save on all of them, with no folder left that looks complete.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megastage.checkpoint import folders
from megastage.checkpoint.agreement import Failure, Ranks, describe, raise_together
from megastage.checkpoint.errors import CheckpointFailed
from megastage.checkpoint.manifest import FileRecord
from megastage.checkpoint.planner import GlobalPlan, LocalSavePlanner, items_digest, items_from_json, items_to_json
from megastage.checkpoint.storage import ChunkWritten, ManifestWriter, tensor_bytes


@dataclass
class SaveJob:
    """What a save needs once the training thread has let go: nothing in it refers to live training state."""

    step: int
    contents: str = "full"
    items: list[WriteItem] = field(default_factory=list)
    shards: dict[str, Tensor] = field(default_factory=dict)
    train_state: bytes = b"{}"
    error: BaseException | None = None  # what went wrong while preparing; told to all ranks


class Saver:
    """Carries out saves into `root` over one group; remembers the global plan between them (rank 0)."""

    def __init__(self, root: Path, ranks: Ranks, *, check_replicas: bool, files_per_rank: int) -> None:
        self.root = root
        self.ranks = ranks
        self.check_replicas = check_replicas
        self.files_per_rank = files_per_rank
        self._digests: list[str] | None = None
        self._plan: GlobalPlan | None = None
        self._items_of_ranks: list[list[WriteItem]] = []

    def save(self, job: SaveJob, before_commit: Callable[[], None]) -> None:
        """Collective. `before_commit` runs on rank 0 when all shards are safe and the final name is about to be taken.

        Raises CheckpointFailed on every rank, naming the ranks that failed, the file and the cause.
        """
        tmp = folders.step_folder(self.root, job.step).with_suffix(".tmp")
        writer = ManifestWriter(
            tmp,
            rank=self.ranks.rank,
            step=job.step,
            contents=job.contents,
            train_state=job.train_state,
            files_per_rank=self.files_per_rank,
        )
        try:
            mine = self._share_plan(job, tmp)
            self._write(job, mine, writer, before_commit)
        except CheckpointFailed:
            if self.ranks.is_main and tmp.exists():
                # One that cannot be removed does no harm: either it has no manifest, or it is complete after all.
                with contextlib.suppress(OSError):
                    folders.remove(tmp)
            raise

    def _share_plan(self, job: SaveJob, tmp: Path) -> list[int]:
        """Positions of the items that this rank writes; `tmp` exists afterwards."""
        digest = items_digest(job.items) if job.error is None else ""
        gathered = self.ranks.gather({"failure": _failure(job.error, self.ranks.rank), "digest": digest})
        verdict: dict[str, Any] = {}
        if gathered is not None:
            verdict = {"failures": [g["failure"] for g in gathered if g["failure"]]}
            if not verdict["failures"]:
                verdict = self._attempt(lambda: _fresh_folder(tmp))
            digests = [g["digest"] for g in gathered]
            verdict["known"] = digests == self._digests
            self._digests = None
        verdict = self.ranks.broadcast(verdict)
        _raise_failures(verdict, job.error)
        if not verdict["known"]:
            rows = self.ranks.gather(items_to_json(job.items))
            verdict = self._attempt(lambda: self._make_plan(rows)) if rows is not None else {}
            verdict = self.ranks.broadcast(verdict)
            _raise_failures(verdict)
        if self.ranks.is_main:
            self._digests = digests
        return self.ranks.scatter(self._plan.writers if self._plan is not None else None)

    def _write(self, job: SaveJob, mine: list[int], writer: ManifestWriter, before_commit: Callable[[], None]) -> None:
        """Write the shards, bring the results together, and let rank 0 commit or everyone fail."""
        report: dict[str, Any] = {}
        error: BaseException | None = None
        try:
            report = self._write_mine(job, mine, writer)
        except BaseException as caught:
            error = caught
        gathered = self.ranks.gather({"failure": _failure(error, self.ranks.rank), **report})
        verdict: dict[str, Any] = {}
        if gathered is not None:
            verdict = {"failures": [g["failure"] for g in gathered if g["failure"]]}
            if not verdict["failures"]:
                verdict = self._attempt(lambda: self._commit(job.step, gathered, writer, before_commit))
        _raise_failures(self.ranks.broadcast(verdict), error)

    def _write_mine(self, job: SaveJob, mine: list[int], writer: ManifestWriter) -> dict[str, Any]:
        chosen = set(mine)
        plan = SavePlan([job.items[i] for i in mine])
        results = writer.write_data(plan, LocalSavePlanner(job.shards)).value()
        by_index = {r.index: r.storage_data for r in results}
        written = [by_index[job.items[i].index] for i in mine]
        files = {w.file.name: asdict(w.file) for w in written}
        copies = []
        if self.check_replicas:
            rest = [i for i in range(len(job.items)) if i not in chosen]
            copies = [[i, zlib.crc32(tensor_bytes(job.shards[job.items[i].index.fqn]))] for i in rest]
        places = [[i, w.file.name, w.begin, w.crc32] for i, w in zip(mine, written)]
        return {"files": list(files.values()), "places": places, "copies": copies}

    def _commit(
        self, step: int, gathered: list[dict[str, Any]], writer: ManifestWriter, before_commit: Callable[[], None]
    ) -> None:
        assert self._plan is not None
        results: list[list[WriteResult]] = []
        crcs: dict[MetadataIndex, tuple[int, int]] = {}
        for rank, (report, items) in enumerate(zip(gathered, self._items_of_ranks)):
            files = {f["name"]: FileRecord(**f) for f in report["files"]}
            results.append([])
            for i, name, begin, crc in report["places"]:
                crcs[items[i].index] = (rank, crc)
                results[-1].append(WriteResult(items[i].index, 0, ChunkWritten(files[name], begin, crc)))
        _compare_copies(gathered, self._items_of_ranks, crcs)
        writer.finish(self._plan.metadata, results)
        before_commit()
        folders.commit(writer.folder, folders.step_folder(self.root, step))

    def _make_plan(self, rows: list[list[Any]]) -> None:
        self._items_of_ranks = [items_from_json(r) for r in rows]
        self._plan = GlobalPlan(self._items_of_ranks)

    def _attempt(self, action: Callable[[], None]) -> dict[str, Any]:
        try:
            action()
        except Exception as error:
            return {"failures": [_failure(error, self.ranks.rank)]}
        return {"failures": []}


def _compare_copies(
    gathered: list[dict[str, Any]],
    items_of_ranks: list[list[WriteItem]],
    crcs: dict[MetadataIndex, tuple[int, int]],
) -> None:
    """What several ranks hold must be equal, or whichever copy was written would be a coin toss."""
    for rank, (report, items) in enumerate(zip(gathered, items_of_ranks)):
        for i, crc in report["copies"]:
            writer_rank, written = crcs[items[i].index]
            if crc != written:
                raise CheckpointFailed(
                    f"{items[i].index.fqn}: ranks {writer_rank} and {rank} hold the same chunk with different values "
                    "(replicas have drifted apart, or the key stands for two tensors)"
                )


def _fresh_folder(tmp: Path) -> None:
    if tmp.exists():
        folders.remove(tmp)
    tmp.mkdir()


def _failure(error: BaseException | None, rank: int) -> dict[str, Any] | None:
    return None if error is None else {**asdict(describe(error, rank)), "kind": "failed"}


def _raise_failures(verdict: dict[str, Any], cause: BaseException | None = None) -> None:
    if verdict["failures"]:
        raise_together([Failure(**f) for f in verdict["failures"]], cause)
