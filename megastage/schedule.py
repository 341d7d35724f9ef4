"""Learning rate and weight decay as functions of the global step.

The run's own schedule is warm-up, stable, decay ([lr_scheduler]): a linear rise over `warmup_steps`, the peak, then
a decay over the last `decay_ratio` of the steps (unset: over everything after warm-up) to `min_lr_factor` of the
peak, one step short of reaching it, so that no update has a learning rate of zero.

A stage that sets lr or lr_end opens a segment of its own at its start. It rises linearly from the learning rate of
the update before to `lr` over `lr_warmup_steps` (from zero at the start of the run or when the stage drops the
optimizer's moments), then decays to `lr_end`, reached at the stage's last update, or stays at `lr` without one.
With lr_end alone the decay starts from the learning rate of the update before. Later stages that say nothing change
nothing: they hold the last value. Weight decay holds in the same way.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from megastage.config.schema import Config
from megastage.config.stage import Stage


def decay_factor(kind: str, progress: float) -> float:
    """What is left of the peak after `progress` (0 to 1) of a decay: "linear", "sqrt" (1 - sqrt) or "cosine"."""
    if kind == "linear":
        return 1.0 - progress
    if kind == "sqrt":
        return 1.0 - math.sqrt(progress)
    assert kind == "cosine", kind
    return 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class _Run:
    """The schedule of [lr_scheduler] over the whole run."""

    peak: float
    warmup_steps: int
    total_steps: int
    decay_steps: int
    decay_type: str
    min_lr_factor: float

    def lr(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        into_decay = step - (self.total_steps - self.decay_steps)
        if into_decay <= 0 or self.decay_steps == 0:
            return self.peak
        left = decay_factor(self.decay_type, min(1.0, into_decay / self.decay_steps))
        return self.peak * (self.min_lr_factor + (1.0 - self.min_lr_factor) * left)


@dataclass(frozen=True)
class _Segment:
    """From `start_step` on: from `before` to `lr` in warm-up, then to `lr_end` at update end_step - 1, then level."""

    start_step: int
    end_step: int
    before: float
    lr: float
    lr_end: float
    warmup_steps: int
    decay_type: str

    def at(self, step: int) -> float:
        done = step - self.start_step + 1
        if done <= self.warmup_steps:
            return self.before + (self.lr - self.before) * done / self.warmup_steps
        decay_steps = self.end_step - self.start_step - self.warmup_steps
        progress = min(1.0, (done - self.warmup_steps) / decay_steps) if decay_steps > 0 else 1.0
        return self.lr_end + (self.lr - self.lr_end) * decay_factor(self.decay_type, progress)


class Schedule:
    """Learning rate and weight decay of every update. `step` is the 0-based index of the update."""

    def __init__(self, cfg: Config, stages: Sequence[Stage]) -> None:
        self._run = _run(cfg)
        self._segments: list[_Segment] = []
        self._decays: list[tuple[int, float]] = [(0, cfg.optimizer.weight_decay)]
        for stage in stages:
            if stage.never_runs:
                continue
            if stage.lr is not None or stage.lr_end is not None:
                self._segments.append(self._segment(cfg, stage))
            if stage.weight_decay is not None:
                self._decays.append((stage.start_step, stage.weight_decay))

    def lr(self, step: int) -> float:
        """Learning rate of update `step`."""
        position = bisect_right(self._segments, step, key=lambda segment: segment.start_step)
        return self._segments[position - 1].at(step) if position else self._run.lr(step)

    def weight_decay(self, step: int) -> float:
        """Weight decay of update `step`."""
        return self._decays[bisect_right(self._decays, step, key=lambda entry: entry[0]) - 1][1]

    def _segment(self, cfg: Config, stage: Stage) -> _Segment:
        start = stage.start_step
        before = self.lr(start - 1) if start > 0 else 0.0
        lr = before if stage.lr is None else stage.lr
        if stage.lr is None and start == 0:
            lr = cfg.optimizer.lr
        return _Segment(
            start_step=start,
            end_step=_segment_end(cfg, stage),
            before=0.0 if stage.reset_optimizer else before,
            lr=lr,
            lr_end=lr if stage.lr_end is None else stage.lr_end,
            warmup_steps=stage.lr_warmup_steps or 0,
            decay_type=stage.lr_decay_type or cfg.lr_scheduler.decay_type,
        )


def _segment_end(cfg: Config, stage: Stage) -> int:
    """Step at which a stage's decay is over.

    With lr_scheduler.total_steps the shape is that of the whole plan, so that a run cut short by training.steps
    keeps it; without, the shape fits the steps that are really run.
    """
    total = cfg.lr_scheduler.total_steps
    if total is None:
        return stage.end_step
    return total if stage.declared_end_step is None else min(stage.declared_end_step, total)


def _run(cfg: Config) -> _Run:
    total = cfg.lr_scheduler.total_steps or cfg.training.steps
    warmup = min(cfg.lr_scheduler.warmup_steps, total)
    ratio = cfg.lr_scheduler.decay_ratio
    decay = total - warmup if ratio is None else min(round(total * ratio), total - warmup)
    return _Run(
        peak=cfg.optimizer.lr,
        warmup_steps=warmup,
        total_steps=total,
        decay_steps=decay,
        decay_type=cfg.lr_scheduler.decay_type,
        min_lr_factor=cfg.lr_scheduler.min_lr_factor,
    )
