"""What a run goes on from, and what its checkpoints say: its own folder first, then checkpoint.initial_load_path."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megastage import build, runtime
from megastage.checkpoint.loading import initial_train_state, load_initial
from megastage.checkpoint.manager import CheckpointManager
from megastage.checkpoint.train_state import TrainState
from megastage.config.frozen import frozen_problems
from megastage.config.layout import Layout
from megastage.config.schema import Config
from megastage.data.engine import DataEngine
from megastage.logs import log
from megastage.optim import Optimizer
from megastage.runtime import Runtime
from megastage.stages import Stage, compare, record, resolve_stages

if TYPE_CHECKING:
    from megastage.startup import Parts

# table -> its keys that a resumed run may have otherwise and should say so; empty: all of them
_HOW_UPDATES_ARE_MADE: dict[str, tuple[str, ...]] = {
    "optimizer": (),
    "lr_scheduler": (),
    "training": ("steps", "max_norm", "dtype", "mixed_precision_param", "mixed_precision_reduce"),
}


class Source:
    """Where model, optimizer and train state come from; `manager` is the run's own folder (None: checkpoints off).

    checkpoint.load_step is where the run starts; when torchrun restarts it, it goes on from its newest.
    """

    def __init__(self, cfg: Config, rt: Runtime, manager: CheckpointManager | None) -> None:
        self.cfg, self.rt, self.manager = cfg, rt, manager
        self.load_step = cfg.checkpoint.load_step if rt.restarts == 0 else -1
        self.own_step = None if manager is None else manager.latest_good(self.load_step)

    @property
    def is_initial(self) -> bool:
        """Whether the run goes on from another run's checkpoint, whole, because it has none of its own yet."""
        settings = self.cfg.checkpoint
        return self.own_step is None and settings.initial_load_path is not None and not settings.initial_load_model_only

    @property
    def excluded(self) -> tuple[str, ...]:
        """checkpoint.exclude_from_loading. With an initial checkpoint it concerns that one: a restart loads all."""
        settings = self.cfg.checkpoint
        own = self.own_step is not None and settings.initial_load_path is not None
        return () if own else settings.exclude_from_loading

    def train_state(self, pinned: dict[str, Any]) -> TrainState | None:
        """The train state to go on from, or None.

        Raises ValueError when it is of another model, tokenizer or seed, or where a first checkpoint is to be made.
        """
        path = self.cfg.checkpoint.initial_load_path
        if self.own_step is not None:
            assert self.manager is not None
            where, raw = f"checkpoint step-{self.own_step}", self.manager.train_state(self.own_step)
        elif self.is_initial:
            assert path is not None
            where, raw = f"checkpoint.initial_load_path = {path!r}", initial_train_state(path, group=self.rt.checkpoint)
        else:
            return None
        state = TrainState.from_json(raw)
        fresh = "train_state" in self.excluded
        problems = frozen_problems({k: v for k, v in state.pinned.items() if not (fresh and k == "debug.seed")}, pinned)
        if problems:
            raise ValueError(f"{where} does not fit:\n  - " + "\n  - ".join(problems))
        if self.cfg.checkpoint.create_seed_checkpoint:
            raise ValueError(
                "checkpoint.create_seed_checkpoint = true: there is a checkpoint to go on from already; "
                "use another checkpoint.folder, or leave it out"
            )
        return state

    def load(self, model: build.Model, optimizer: Optimizer) -> TrainState | None:
        """Fill model and optimizer from a checkpoint whose every byte is right; its train state.

        None where nothing can be loaded from the run's own folder after all.
        """
        tensors = {**model.tensors(), **optimizer.state_tensors()}
        if self.is_initial:
            path = self.cfg.checkpoint.initial_load_path
            assert path is not None
            raw = load_initial(path, tensors, group=self.rt.checkpoint, model_only=False, exclude=self.excluded)
            state = TrainState.from_json(raw)
            log.info("Going on from %s: step %d (stage '%s')", path, state.step, state.stage_name)
        else:
            assert self.manager is not None
            found = self.manager.load_newest(tensors, self.load_step, exclude=self.excluded)
            if found is None:
                return None
            state = TrainState.from_json(found[1])
            log.info("Resuming from checkpoint step-%d (stage '%s')", found[0], state.stage_name)
        optimizer.set_steps(0 if "optimizer" in self.excluded else int(state.optimizer["step"]))
        return state


def base_global_batch_size(cfg: Config, layout: Layout, saved: TrainState | None) -> int:
    """What training.global_batch_size means: as written; for -1 what the run's first start made of it."""
    if cfg.training.global_batch_size != -1:
        return cfg.training.global_batch_size
    if saved is not None and saved.step > 0:  # a seed checkpoint was written by one process for any layout
        return saved.global_batch_size
    first = resolve_stages(cfg, layout, seed=0)[0]
    return first.local_batch_size * first.data_ranks


def resolve_seed(cfg: Config, rt: Runtime, saved: TrainState | None) -> int:
    """The checkpoint's seed, the configured one, or one drawn on rank 0."""
    configured = cfg.debug.seed
    if saved is not None:
        return saved.seed
    drawn = torch.tensor([secrets.randbits(31) if configured is None else configured])
    dist.broadcast(drawn, src=0, group=rt.control)
    return int(drawn.item())


def open_checkpoints(cfg: Config, rt: Runtime) -> CheckpointManager | None:
    """The manager of the run's checkpoint folder; None when checkpoints are off."""
    settings = cfg.checkpoint
    if not settings.enable:
        return None
    folder = Path(cfg.job.dump_folder) / settings.folder
    if not settings.load_only:
        runtime.make_writable(str(folder), "checkpoint.folder", rt.is_main)
    return CheckpointManager(
        folder,
        group=rt.checkpoint,
        keep_latest_k=settings.keep_latest_k,
        async_mode=settings.async_mode,
        hold=not settings.load_only,
        load_only=settings.load_only,
    )


def settle(cfg: Config, layout: Layout, seed: int, saved: TrainState | None) -> tuple[int, tuple[Stage, ...]]:
    """The global batch size and the stages of a run that goes on from `saved`. Raises ValueError for an edited past."""
    base_batch = base_global_batch_size(cfg, layout, saved)
    stages = resolve_stages(cfg, layout, seed=seed, global_batch_size=base_batch)
    if saved is not None:
        compare_past(saved, stages, cfg)
    return base_batch, stages


def compare_past(saved: TrainState, stages: tuple[Stage, ...], cfg: Config) -> None:
    """Refuse edits of what was trained on; print those of the future, and of how it is trained from here on."""
    problems, edits = compare(saved.stages, stages, saved.step)
    if problems:
        raise ValueError(
            f"the configuration contradicts the checkpoint of step {saved.step}:\n  - " + "\n  - ".join(problems)
        )
    edits += changed_settings(saved.config, cfg.model_dump(mode="json"))
    if edits:
        log.info("Changed since the checkpoint:\n  - %s", "\n  - ".join(edits))


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys outside the stages that change how updates are made, with both values; `old` is a saved configuration."""
    return [
        f"{table}.{key} {json.dumps(before)} -> {json.dumps(new[table][key])}"
        for table, keys in _HOW_UPDATES_ARE_MADE.items()
        for key, before in old.get(table, {}).items()
        if key in new[table] and (not keys or key in keys) and new[table][key] != before
    ]


def tensors_to_save(model: build.Model, optimizer: Optimizer) -> dict[str, Tensor]:
    """All tensors of a checkpoint that this rank holds, a tied weight once."""
    tensors = {**model.tensors(), **optimizer.state_tensors()}
    skipped = model.tied.counted_elsewhere
    return {key: value for key, value in tensors.items() if not any(key.endswith(f".{name}") for name in skipped)}


def train_state(cfg: Config, parts: Parts, step: int, stage: Stage) -> dict[str, Any]:
    """What a checkpoint says besides tensors, after `step` updates; `stage` is that of the next."""
    samples, tokens = consumed(parts.stages, parts.data)
    layout = asdict(parts.mesh.layout)
    return TrainState(
        step=step,
        stage_idx=stage.index,
        stage_name=stage.name,
        seed=parts.seed,
        dataloader_state=parts.data.state(),
        consumed_samples=samples,
        consumed_tokens=tokens,
        global_batch_size=parts.base_global_batch_size,
        optimizer={"step": parts.optimizer.steps},
        config=cfg.model_dump(mode="json"),
        stages=[record(each) for each in parts.stages],
        pinned=parts.pinned,
        layout={key: int(value) for key, value in layout.items()},
    ).to_json()


def consumed(stages: tuple[Stage, ...], data: DataEngine) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows and input tokens read so far, by stage and source."""
    rows = data.consumed_rows()
    by_name = {stage.name: stage for stage in stages}
    tokens = {
        name: {source: count * by_name[name].seq_len for source, count in counts.items()}
        for name, counts in rows.items()
    }
    return rows, tokens


def save(cfg: Config, parts: Parts, step: int, stage: Stage) -> None:
    """Write step-N as [checkpoint] asks: everything, or at the end of the run perhaps the model alone."""
    assert parts.checkpoints is not None
    settings = cfg.checkpoint
    model_only = settings.last_save_model_only and step == cfg.training.steps
    parts.checkpoints.save(
        step,
        tensors_to_save(parts.model, parts.optimizer),
        train_state(cfg, parts, step, stage),
        model_only=model_only,
        export_dtype=build.data.DTYPES[settings.export_dtype] if model_only else None,
    )
