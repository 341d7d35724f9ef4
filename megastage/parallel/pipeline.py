"""Pipeline parallelism: which layers a rank holds, and the schedule that runs one optimizer step's micro-batches.

Shapes are fixed when a schedule is made, so every stage gets its own schedule over the same module. A pipeline of one
part runs its micro-batches in a plain loop behind the same interface.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from megastage.config.schema import Parallelism
from megastage.data.batch import Batch
from megastage.loss import ModelPart

SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


def split_layers(n_layers: int, parts: int, first_less: int = 1, last_less: int = 1) -> list[range]:
    """Contiguous layer ranges, as even as they can be when the embedding counts as `first_less` layers and the head as
    `last_less` (Llama 3, section 3.3.2). One part takes all.

    Raises ValueError when a part would be empty.
    """
    if parts == 1:
        return [range(n_layers)]
    effective = n_layers + first_less + last_less
    if n_layers < parts or effective < parts:
        raise ValueError(
            f"parallelism.pipeline_parallel_degree = {parts}: the model has only {n_layers} layers; "
            "use a smaller degree"
        )
    bounds = [round(effective * i / parts) - first_less for i in range(parts + 1)]
    bounds = [min(max(bound, i), n_layers - (parts - i)) for i, bound in enumerate(bounds)]
    bounds[0], bounds[-1] = 0, n_layers
    return [range(a, b) for a, b in pairwise(bounds)]


def split_model(table: Parallelism, n_layers: int) -> list[range]:
    """The layers of each part as [parallelism] asks: by explicit split points, layers per part, or evenly.

    Raises ValueError naming the key that can't be met.
    """
    parts = table.pipeline_parallel_degree
    if table.pipeline_parallel_split_points:
        return _split_at(table.pipeline_parallel_split_points, n_layers, parts)
    per_part = table.pipeline_parallel_layers_per_stage
    if per_part is not None and parts > 1 and -(-n_layers // per_part) != parts:
        raise ValueError(
            f"parallelism.pipeline_parallel_layers_per_stage = {per_part}: {n_layers} layers then make "
            f"{-(-n_layers // per_part)} parts, but pipeline_parallel_degree = {parts}; make the two agree"
        )
    if per_part is not None and parts > 1:
        return [range(i * per_part, min((i + 1) * per_part, n_layers)) for i in range(parts)]
    return split_layers(
        n_layers,
        parts,
        table.pipeline_parallel_first_stage_less_layers,
        table.pipeline_parallel_last_stage_less_layers,
    )


def _split_at(points: Sequence[str], n_layers: int, parts: int) -> list[range]:
    key = f"parallelism.pipeline_parallel_split_points = {list(points)}"
    if len(points) != parts - 1:
        raise ValueError(f"{key}: pipeline_parallel_degree = {parts} needs {parts - 1} split points")
    starts = []
    for point in points:
        match = re.fullmatch(r"layers\.(\d+)", point)
        if match is None or not 0 < int(match[1]) < n_layers:
            raise ValueError(f'{key}: "{point}" names no layer after the first; write "layers.N", 0 < N < {n_layers}')
        starts.append(int(match[1]))
    if sorted(set(starts)) != starts:
        raise ValueError(f"{key}: the layers must ascend")
    return [range(a, b) for a, b in pairwise([0, *starts, n_layers])]


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
