"""A resolved stage: everything a part of the run needs to know, with inheritance done."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from megastage.model.config import RopeSpec


@dataclass(frozen=True)
class Stage:
    """Updates start_step <= step < end_step. Built by `resolve_stages`; names are those of the TOML keys.

    dataset, dataset_path: None where the stage's type or folders make no use of them.
    dataset_folders: empty for a single source. dataset_weights: one per source, as written (shares: `shares`).
    global_batch_size: rows per optimizer step. data_ranks x micro_batches x micro_batch_size = global_batch_size:
    without a pipeline micro_batch_size is local_batch_size and micro_batches the accumulation steps.
    rope: of this stage, the model's own where nothing else is set. recompute: (mode, option).
    min_doc_len, long_doc_len, long_doc_share: as `megastage.data.doc_rule.DocRule`; 0, 0, None: all documents alike.
    lr ... reset_optimizer: as written in the stage, None where it is silent; `schedule.Schedule` reads them.
    declared_end_step: end_step as written or implied by the next stage, before it was cut to training.steps; None for
    a last stage without one.
    inherited: the data keys that the stage did not set itself. notes: what to tell the user about the stage.
    """

    index: int
    name: str
    start_step: int
    end_step: int
    never_runs: bool
    dataset: str | None
    dataset_path: str | None
    dataset_type: str
    dataset_folders: tuple[str, ...]
    dataset_weights: tuple[float, ...]
    dataset_random_seed: int
    seq_len: int
    local_batch_size: int
    global_batch_size: int
    context_parallel_degree: int
    document_mask: bool
    rope: RopeSpec
    recompute: tuple[str, str]
    lr: float | None = None
    lr_end: float | None = None
    lr_decay_type: str | None = None
    lr_warmup_steps: int | None = None
    weight_decay: float | None = None
    reset_optimizer: bool = False
    min_doc_len: int = 0
    long_doc_len: int = 0
    long_doc_share: float | None = None
    declared_end_step: int | None = None
    data_ranks: int = 1
    micro_batch_size: int = 1
    micro_batches: int = 1
    inherited: frozenset[str] = frozenset()
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def steps(self) -> int:
        """Updates of the stage; 0 when it never runs."""
        return self.end_step - self.start_step

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of one optimizer step over the whole job."""
        return self.global_batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        """Input tokens of the stage."""
        return self.steps * self.tokens_per_step

    @property
    def sources(self) -> tuple[str, ...]:
        """What is opened, one entry per weight: the folders, or the path, or the dataset's name."""
        return self.dataset_folders or (self.dataset_path or self.dataset or "",)

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights as shares of one, computed exactly from their decimal text."""
        exact = [Fraction(repr(weight)) for weight in self.dataset_weights]
        total = sum(exact)
        return tuple(float(weight / total) for weight in exact)


def lookup(stages: tuple[Stage, ...], step: int) -> Stage:
    """The stage of update `step` (0-based); at or beyond the end of the run, the last stage that runs."""
    running = [stage for stage in stages if not stage.never_runs]
    for stage in reversed(running):
        if stage.start_step <= step:
            return stage
    raise ValueError(f"step {step} is before the first stage, which starts at {running[0].start_step}")
