"""The data engine of a run: all stages' sources and order, one stage entered at a time, batches in global order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megastage.data.batch import Batch, assemble
from megastage.data.collective import Group
from megastage.data.fetch import RowTools
from megastage.data.index import DataIndex, DataStage, build_index
from megastage.data.loader import Prefetcher
from megastage.data.plan import Plan, Planner
from megastage.data.report import plan_lines
from megastage.data.sources.base import SourceOptions
from megastage.data.state import StageRecord, check_frozen, from_json, note_epochs, record_of, to_json


class DataEngine:
    """Reads the global sample order of the entered stage: this data rank's slice of each batch.

    The order does not depend on ranks, workers or prefetching, and the state is a few integers per stage and source.
    """

    def __init__(
        self,
        stages: Sequence[DataStage],
        index: DataIndex,
        records: Sequence[StageRecord] = (),
        *,
        vocab_size: int | None = None,
        num_workers: int = 0,
        prefetch_batches: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """See `build`, which every rank should use."""
        self.stages, self.index = {stage.index: stage for stage in stages}, index
        self._records = list(records)
        self._vocab_size, self._workers, self._depth = vocab_size, num_workers, prefetch_batches
        self._pin = pin_memory and torch.cuda.is_available()
        running = [stage for stage in stages if stage.index in index.stages]
        self._tools = RowTools.make(
            index.sources.values(),
            max((stage.global_batch_size * stage.seq_len for stage in running), default=0),
            pin=self._pin,
        )
        self._stage: DataStage | None = None
        self._loader: Prefetcher[Plan, Batch] | None = None
        self._digest = ""

    @classmethod
    def build(
        cls,
        stages: Sequence[DataStage],
        *,
        group: Group = None,
        state: Mapping[str, Any] | None = None,
        options: SourceOptions | None = None,
        vocab_size: int | None = None,
        num_workers: int = 0,
        prefetch_batches: int = 0,
        pin_memory: bool = False,
        node_leader: bool | None = None,
        superblock_tokens: int | None = None,
    ) -> DataEngine:
        """Open and check the data of all stages on all ranks. A collective call on the CPU `group` (None: one process).

        state: what `state()` gave, to go on from there; options: tokenizer, cache folder, EOS id for the readers;
        vocab_size: the model's; superblock_tokens: of a shuffled block of a token stream (None: chosen).
        Raises DataError, with the same text on every rank, for anything wrong with the data, and ValueError when the
        past stages of `state` are not those of this run.
        """
        records, settings = from_json(state) if state is not None else ([], {})
        index = build_index(
            stages,
            group=group,
            options=options or SourceOptions(),
            vocab_size=vocab_size,
            settings=settings,
            node_leader=node_leader,
            superblock_tokens=superblock_tokens,
        )
        check_frozen(records, stages, index)
        return cls(
            stages,
            index,
            records,
            vocab_size=vocab_size,
            num_workers=num_workers,
            prefetch_batches=prefetch_batches,
            pin_memory=pin_memory,
        )

    def enter(self, stage_index: int, *, data_rank: int, data_ranks: int, global_batch_size: int | None = None) -> None:
        """Begin a stage, or go on in it where the state says. global_batch_size: rows a step, default the stage's.

        A stage before the last one read from cannot be entered again: positions only go forward.
        """
        if not 0 <= data_rank < data_ranks:
            raise ValueError(f"data rank {data_rank} of {data_ranks}")
        if self._records and stage_index < self._records[-1].index:
            raise ValueError(
                f"stage {stage_index + 1} comes before stage {self._records[-1].index + 1}, which has been read from; "
                "load an earlier checkpoint to go back"
            )
        stage = self.stages[stage_index]
        rows = global_batch_size or stage.global_batch_size
        if rows < data_ranks:
            raise ValueError(f"global_batch_size {rows} is smaller than the number of data ranks {data_ranks}")
        self._leave()
        if not self._records or self._records[-1].index != stage_index:
            self._records.append(record_of(stage, self.index))
        *before, record = self._records
        self._stage, self._slice = stage, (rows * data_rank // data_ranks, rows * (data_rank + 1) // data_ranks)
        planner = Planner(self.index, before, record)
        record.skipped_tokens = planner.skipped_tokens
        first = record.samples
        self._loader = Prefetcher(
            lambda number: planner.plan(first + number * rows, first + (number + 1) * rows),
            self._read,
            workers=self._workers,
            depth=self._depth,
        )

    def next(self) -> Batch:
        """This rank's rows of the next global batch. Errors of the data name their source."""
        assert self._loader is not None, "enter a stage first"
        plan, batch = self._loader.next()
        record = self._records[-1]
        record.samples = plan.start + len(plan.source)
        record.marks.update(plan.marks)
        self._digest = plan.digest
        return batch

    def sample_digest(self) -> str:
        """A hash of the whole last global batch's sample ids in order, equal on every rank of every layout."""
        return self._digest

    @property
    def wait_s(self) -> float:
        """Seconds that the last `next()` waited for data."""
        return self._loader.wait_s if self._loader is not None else 0.0

    @property
    def samples(self) -> int:
        """Samples of the entered stage that were handed out."""
        return self._records[-1].samples if self._records else 0

    def consumed_rows(self) -> dict[str, dict[str, int]]:
        """Rows handed out so far: stage name -> source path -> count."""
        return {
            record.name: {
                source.path: rows
                for source, rows in zip(mine.sources, mine.table.counts_at(record.samples).tolist(), strict=True)
            }
            for record in self._records
            for mine in (self.index.stages[record.index],)
        }

    def state(self) -> dict[str, Any]:
        """JSON: the position behind the last batch handed out, whatever was read ahead; equal on every rank."""
        note_epochs(self._records, self.index)
        return to_json(self._records, self.index)

    def plan_lines(self, stage: DataStage) -> list[str]:
        """What the stage will read of each source: tokens, epochs, what is skipped; notes on weights."""
        return plan_lines(stage, list(self.stages.values()), self.index, self._records)

    def close(self) -> None:
        """Stop the reading threads. Safe to call twice."""
        self._leave()
        for source in self.index.sources.values():
            source.close()

    def _leave(self) -> None:
        if self._loader is not None:
            note_epochs(self._records, self.index)
            self._loader.close()
        self._loader = self._stage = None

    def _read(self, plan: Plan) -> Batch:
        assert self._stage is not None
        source_B, ids_B, rows = plan.part(*self._slice)
        batch = assemble(
            self.index.stages[self._stage.index].sources,
            source_B,
            ids_B,
            rows,
            seq_len=self._stage.seq_len,
            document_mask=self._stage.document_mask,
            vocab_size=self._vocab_size,
            tools=self._tools,
        )
        return batch.pin_memory() if self._pin else batch
