"""The run: everything is built once, then a loop that reads from top to bottom."""

from __future__ import annotations

import gc
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megastage import boundary, export, flops, logs, resume, startup, validation
from megastage.config.schema import Config
from megastage.data.batch import Batch
from megastage.logs import log
from megastage.metrics import Sink, memory_gib
from megastage.optim import clip_scale, gradient_norm
from megastage.parallel.context import ContextGroup
from megastage.parallel.pipeline import Runner
from megastage.profiling import Profiling
from megastage.runtime import Runtime, collect_young
from megastage.schedule import Schedule
from megastage.source_loss import by_source, source_sums
from megastage.stages import Stage, lookup


class Trainer:
    """A run of `cfg` on the ranks of `runtime`; building it resumes from the newest good checkpoint where there is one.

    Raises ValueError (with every problem found) for configurations, data or checkpoints that can't be used.
    """

    stage: Stage
    context: ContextGroup
    runner: Runner

    def __init__(self, cfg: Config, runtime: Runtime) -> None:
        self.cfg, self.runtime = cfg, runtime
        self.parts = parts = startup.prepare(cfg, runtime)
        self.mesh, self.model, self.optimizer = parts.mesh, parts.model, parts.optimizer
        self.stages, self.data, self.checkpoints = parts.stages, parts.data, parts.checkpoints
        self.schedule = Schedule(cfg, self.stages)
        self.step = parts.step
        self.peak_flops = flops.peak_flops(device_name(runtime.device))
        self.sinks: list[Sink] = startup.open_sinks(cfg, runtime, self.step)
        self.profiling = Profiling(cfg, runtime, self.step)
        self.warm = False
        self.colors = logs.colors_wanted(cfg.metrics.disable_color_printing)
        startup.log_plan(cfg, runtime, parts)

    def run(self) -> None:
        """Train to the last step, or to a signal to stop. The newest state is on disk when this returns."""
        cfg, steps = self.cfg, self.cfg.training.steps
        if cfg.checkpoint.create_seed_checkpoint:
            self.save()
            self.close()
            return
        self.runtime.watch_signals()
        gc.disable()  # collections at their own pace stall one rank and so all: collect together instead
        progress = logs.Progress(self.step, steps, enabled=self.runtime.is_main)
        current: Stage | None = None
        stop = False
        with self.profiling.watch():
            while self.step < steps and not stop:
                stage = lookup(self.stages, self.step)
                if stage is not current:
                    self.expect_slow_update()
                    boundary.apply(self, stage)
                    current = stage
                record, stop = self.train_step()
                progress.update(record)
                self.validate(record)
                self.report(record)
                if self.due_for_checkpoint() or stop:
                    self.save()
                self.after_step()
        progress.close()
        gc.enable()
        target = cfg.checkpoint.export
        if target is not None and self.step >= steps and not export.exists(target, self.runtime):
            self.export(Path(target))
        if stop:
            log.info("Stopped by a signal after step %d%s", self.step, "; saved" if self.checkpoints else "")
        self.close()

    def train_step(self) -> tuple[dict[str, Any], bool]:
        """One update: batch, forward and backward, norm, optimizer. Returns its metrics and whether to stop."""
        began = time.perf_counter()
        batch = self.data.next()
        data_wait_s = time.perf_counter() - began
        work = flops.train_flops(self.model.cfg, batch.cu_seqlens_BC) / self.context.degree  # a row is shared in CP
        batch = self.context.shard(batch.to(self.runtime.device))
        valid = self.count_valid(batch)
        scale = self.mesh.data.size() / max(valid, 1)  # FSDP averages gradients over the data ranks
        self.model.part.row_losses = [] if self.cfg.metrics.per_source_loss else None
        loss_sum = self.runner.step(batch, scale)
        self.model.tied.sum_gradients(self.model.parameters)
        norm = gradient_norm(
            self.model.parameters, self.mesh, self.model.tied.counted_elsewhere, self.cfg.kernels.optimizer
        )
        loss, model_flops, stop, each = self.reduce(loss_sum, valid, work, batch)
        self.refuse_non_finite(loss, norm.item())
        lr, weight_decay = self.schedule.lr(self.step), self.schedule.weight_decay(self.step)
        if valid:
            self.optimizer.step(lr, weight_decay, clip_scale(norm, self.cfg.training.max_norm))
        else:
            self.pass_over()
        self.step += 1
        step_s = time.perf_counter() - began
        rows_tokens = self.stage.global_batch_size * self.stage.seq_len
        record = {
            "step": self.step,
            "stage": self.stage.name,
            "loss": loss if valid else None,
            "grad_norm": norm.item(),
            "lr": lr,
            "tokens": startup.consumed_tokens(self.stages, self.step),
            "tokens_per_s": rows_tokens / step_s,
            "sample_digest": self.data.sample_digest(),
            "mfu": flops.utilisation(model_flops, step_s, self.runtime.world_size, self.peak_flops),
            "memory_gib": memory_gib(self.runtime.device),
            "data_wait_s": data_wait_s,
            "step_s": step_s,
            "seq_len": self.stage.seq_len,
            "valid_labels": valid,
            "weight_decay": weight_decay,
            **({"loss_by_source": each} if self.cfg.metrics.per_source_loss else {}),
        }
        return record, stop

    def validate(self, record: dict[str, Any]) -> None:
        """Put the loss on held-out data into the record of the update after which it is due."""
        validator = self.parts.validator
        if validator is not None and validator.due(self.step, self.stage):
            record["validation"] = result = validator.run(self.model, self.mesh, self.context)
            log.info(validation.line(self.step, self.cfg.training.steps, result))

    def expect_slow_update(self) -> None:
        """Before a stage's first update, which connects and compiles: the timeout of start-up."""
        self.runtime.set_timeout(self.cfg.comm.init_timeout_seconds)
        self.warm = False

    def after_step(self) -> None:
        """Garbage, traces, and after a stage's first update the timeout of training."""
        self.profiling.step()
        if self.step % self.cfg.training.gc_freq == 0:
            collect_young(report=self.cfg.training.gc_debug)
        if not self.warm:
            self.warm = True
            self.runtime.set_timeout(self.cfg.comm.train_timeout_seconds)

    def count_valid(self, batch: Batch) -> int:
        """Labels of the global batch that count: the loss is the mean over them."""
        valid = (batch.labels_BT != -100).sum()
        dist.all_reduce(valid, group=self.mesh.group("data"))
        return int(valid.item())

    def reduce(
        self, loss_sum: torch.Tensor, valid: int, work: float, batch: Batch
    ) -> tuple[float, float, bool, dict[str, float]]:
        """Mean loss, the step's model FLOPs, whether any rank was told to stop, and the mean loss of each source (where
        it is asked for): one small all-reduce over all, whose sums in float64 of losses in float32 are exact."""
        counts = self.mesh.tp_rank == 0 and self.mesh.pp_rank == self.mesh.layout.pp - 1
        names = self.stage.sources if self.cfg.metrics.per_source_loss else ()
        sums = torch.tensor([0.0, work if counts else 0.0, float(self.runtime.stop_signal > 0)], dtype=torch.float64)
        sums = sums.to(self.runtime.device)
        if counts:
            sums[0] = loss_sum
        part = self.model.part
        rows, part.row_losses = part.row_losses or (), None  # validation's rows are of other sources
        if names:
            rows = rows if counts or part.split_positions else ()
            sums = torch.cat((sums, source_sums(batch, rows, len(names), count_labels=counts).flatten()))
        dist.all_reduce(sums)
        loss_total, flops_total, signals, *each = sums.tolist()
        return loss_total / max(valid, 1), flops_total, signals > 0, by_source(names, each)

    def pass_over(self) -> None:
        """Leave weights and moments as they are: no label of the batch counts, so that there is nothing to learn."""
        self.optimizer.drop_gradients()
        if self.runtime.is_main:
            log.warning(
                "Step %d: no label of the batch counts (all are masked, or the documents are of one token); "
                "its samples are consumed, weights and optimizer stay as they were",
                self.step + 1,
            )

    def refuse_non_finite(self, loss: float, norm: float) -> None:
        """Stop before a broken update reaches the weights; the newest checkpoint stays good."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        raise FloatingPointError(
            f"update {self.step} (stage '{self.stage.name}', samples {self.data.sample_digest()}): loss {loss}, "
            f"gradient norm {norm}. The weights were not changed; resume from the last checkpoint with a lower "
            'optimizer.lr or training.max_norm, or with training.mixed_precision_param = "float32"'
        )

    def report(self, record: dict[str, Any]) -> None:
        """The step line every metrics.log_freq steps and at a stage's first and last; every step to the sinks."""
        step = record["step"]
        edge = step in (self.stage.start_step + 1, self.stage.end_step)
        if step % self.cfg.metrics.log_freq == 0 or edge:
            log.info(logs.step_line(record, self.cfg.training.steps, colors=self.colors))
        for sink in self.sinks:
            sink.write(record)

    def due_for_checkpoint(self) -> bool:
        """At the interval, at every stage boundary, at the end, and after the first step if asked."""
        settings = self.cfg.checkpoint
        return (
            self.step % settings.interval == 0
            or self.step in (self.stage.end_step, self.cfg.training.steps)
            or (self.step == 1 and settings.enable_first_step_checkpoint)
        )

    def save(self) -> None:
        """Write step-N, N completed updates, with the stage and position of update N."""
        settings = self.cfg.checkpoint
        if self.checkpoints is None or settings.load_only:
            return
        if settings.last_save_in_hf and self.step == self.cfg.training.steps:
            target = self.checkpoints.root / f"step-{self.step}.hf"
            export.set_aside(target, self.runtime)
            self.export(target)
            return
        began = time.perf_counter()
        resume.save(self.cfg, self.parts, self.step, lookup(self.stages, self.step))
        log.info("Saved checkpoint step-%d (%.2f s stalled)", self.step, time.perf_counter() - began)

    def export(self, folder: Path) -> None:
        """Write the weights as a Hugging Face folder."""
        stage = lookup(self.stages, self.step)
        export.write(self.cfg, self.runtime, self.mesh, self.model, stage, folder, self.parts.tokenizer)

    def close(self) -> None:
        """Finish a save under way and release files and workers."""
        if self.checkpoints is not None:
            self.checkpoints.close()
        self.data.close()
        for sink in self.sinks:
            sink.close()


def device_name(device: torch.device) -> str:
    """The name that the driver gives the device; "cpu" for CPUs."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
