"""Pipeline parallelism: the schedule that runs the micro-batches of one optimizer step over the parts of the model.

Shapes are fixed when a schedule is made, so every stage gets its own schedule over the same module. A pipeline of one
part runs its micro-batches in a plain loop behind the same interface.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from megastage.data.batch import Batch
from megastage.loss import ModelPart

SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


class Runner(Protocol):
    """Runs forward and backward of all micro-batches of a step."""

    def step(self, batch: Batch, loss_scale: float) -> Tensor:
        """Accumulate gradients of loss_scale * (sum of losses); returns the unscaled sum (0 where there is no head)."""
        ...


class LoopRunner:
    """Gradient accumulation without a pipeline."""

    def __init__(self, part: ModelPart, rows: int) -> None:
        self.part, self.rows = part, rows

    def step(self, batch: Batch, loss_scale: float) -> Tensor:
        total = torch.zeros((), device=batch.tokens_BT.device, dtype=torch.float64)
        for micro in batch.split(self.rows):
            loss = self.part(micro.tokens_BT, micro.positions_BT, micro.cu_seqlens_BC, micro.labels_BT)
            (loss * loss_scale).backward()
            total += loss.detach()
        return total


class PipelineRunner:
    """One `schedule.step` per optimizer step; micro-batches of `rows` rows flow through the parts of the pp group."""

    def __init__(
        self,
        part: ModelPart,
        group: dist.ProcessGroup,
        *,
        schedule: str,
        rows: int,
        micro_batches: int,
        seq_len: int,
        hidden_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        index, parts = group.rank(), group.size()
        tp = part.tp_group.size() if part.tp_group is not None else 1
        tokens = torch.empty(rows, seq_len, dtype=torch.int64, device="meta")
        hidden = torch.empty(rows, seq_len // tp, part.decoder.cfg.dim, dtype=hidden_dtype, device="meta")
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        stage = PipelineStage(
            part,
            index,
            parts,
            device,
            input_args=tokens if index == 0 else hidden.requires_grad_(),
            output_args=loss if index == parts - 1 else hidden.requires_grad_(),
            group=group,
        )
        self.first, self.last, self.part = index == 0, index == parts - 1, part
        self.shape = (rows * micro_batches, seq_len)
        self.loss_scale = 1.0
        self.loss_sums: list[Tensor] = []
        self.schedule = SCHEDULES[schedule.lower()](stage, micro_batches, loss_fn=self._scaled, scale_grads=False)

    def _scaled(self, loss: Tensor, _target: Tensor) -> Tensor:
        self.loss_sums.append(loss.detach())
        return loss * self.loss_scale

    def step(self, batch: Batch, loss_scale: float) -> Tensor:
        # other shapes on an old schedule abort the process inside gloo, with no word of why
        assert tuple(batch.tokens_BT.shape) == self.shape, (tuple(batch.tokens_BT.shape), self.shape)
        self.loss_scale = loss_scale
        self.loss_sums.clear()
        self.schedule.step(
            *((batch.tokens_BT,) if self.first else ()),
            target=batch.ids_B if self.last else None,
            return_outputs=False,
            positions_BT=batch.positions_BT,
            cu_seqlens_BC=batch.cu_seqlens_BC,
            labels_BT=batch.labels_BT,
        )
        total = torch.zeros((), device=batch.tokens_BT.device, dtype=torch.float64)
        for loss in self.loss_sums:
            total += loss
        return total
