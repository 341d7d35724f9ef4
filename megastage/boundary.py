"""Everything that a stage change does, in the order it is done. TP, PP and the sharding of states stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megastage import build
from megastage.logs import log
from megastage.runtime import collect_garbage
from megastage.stages import Stage, lookup, transition_text

if TYPE_CHECKING:
    from megastage.trainer import Trainer


def apply(trainer: Trainer, stage: Stage) -> None:
    """Bring `trainer` into `stage` before its next update: data position, RoPE table, recomputation, batch shape and
    schedule. At the first update of a stage that is not the first, the transition is logged, also on a resumed run."""
    step, mesh = trainer.step, trainer.mesh
    if step == stage.start_step and step > 0:
        log.info(transition_text(step, lookup(trainer.stages, step - 1), stage))
        if stage.reset_optimizer:
            trainer.optimizer.reset()
    cp = stage.context_parallel_degree
    trainer.data.enter(stage.index, data_rank=mesh.data_rank // cp, data_ranks=mesh.layout.data_ranks(cp))
    trainer.context = trainer.parts.contexts[cp]
    build.fit_to_stage(trainer.cfg, trainer.model, stage, trainer.context)
    trainer.runner = build.make_runner(trainer.cfg, trainer.model, mesh, stage, trainer.runtime.device)
    trainer.stage = stage
    collect_garbage(trainer.runtime.device)
    connect(trainer)


def connect(trainer: Trainer) -> None:
    """One small collective on every group that the stage's updates use: the first may be slow to connect, and shall
    not be so inside a timed update, or between the messages of a pipeline."""
    groups = [dist.group.WORLD, *(trainer.mesh.group(name) for name in ("data", "rep", "shard", "tp", "pp"))]
    groups += [group for group in (trainer.context.group, trainer.model.tied.group) if group is not None]
    warm = torch.zeros(1, device=trainer.runtime.device)
    for group in groups:
        dist.all_reduce(warm, group=group)
