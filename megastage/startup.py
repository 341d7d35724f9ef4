"""What happens before the first update, in order: layout, model, checkpoint, stages, data, plan."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megastage import build, initial, runtime
from megastage.checkpoint.manager import CheckpointManager
from megastage.checkpoint.train_state import TrainState
from megastage.config.frozen import frozen_facts, frozen_problems
from megastage.config.layout import Layout, resolve_layout
from megastage.config.model_choice import model_config
from megastage.config.schema import Config
from megastage.data.engine import DataEngine
from megastage.data.sources.base import SourceOptions
from megastage.data.tokenizer import Tokenizer, load_tokenizer
from megastage.logs import log
from megastage.metrics import JsonLines, Sink, TensorBoard, Wandb
from megastage.model.config import ModelConfig
from megastage.optim import Optimizer
from megastage.parallel.context import ContextGroup, make_groups
from megastage.parallel.mesh import Mesh, build_mesh
from megastage.runtime import Runtime
from megastage.stages import Stage, compare, plan_text, record, resolve_stages, stage_notes


@dataclass
class Parts:
    """Everything a trainer is made of, at the state of `step` completed updates."""

    mesh: Mesh
    model: build.Model
    optimizer: Optimizer
    stages: tuple[Stage, ...]
    data: DataEngine
    contexts: dict[int, ContextGroup]
    checkpoints: CheckpointManager | None
    seed: int
    base_global_batch_size: int
    pinned: dict[str, Any]
    step: int


def prepare(cfg: Config, rt: Runtime) -> Parts:
    """Build the run on all ranks, from the newest good checkpoint where there is one.

    Raises ValueError (on every rank) for input that can't be used.
    """
    runtime.set_deterministic(cfg.debug.deterministic, cfg.debug.deterministic_warn_only)
    runtime.make_writable(cfg.job.dump_folder, "job.dump_folder", rt.is_main)
    layout = resolve_layout(cfg, rt.world_size)
    tokenizer = open_tokenizer(cfg)
    model_cfg = with_vocabulary(cfg, model_config(cfg), tokenizer)
    mesh = build_mesh(layout, rt.device.type)
    checkpoints = open_checkpoints(cfg, rt)
    tokenizer_hash = None if tokenizer is None else tokenizer.sha256
    pinned = frozen_facts(model_cfg, seed=cfg.debug.seed, tokenizer_sha256=tokenizer_hash)
    saved = read_train_state(cfg, checkpoints, pinned)
    seed = resolve_seed(cfg, rt, saved)
    runtime.seed_everything(seed)
    model = build.build_model(cfg, model_cfg, mesh, rt.device)
    optimizer = make_optimizer(cfg, model)
    if saved is not None and checkpoints is not None:
        saved = load(cfg, checkpoints, model, optimizer)
    if saved is None:
        initial.fill(cfg, rt, model, seed)
    base_batch = base_global_batch_size(cfg, layout, saved)
    stages = resolve_stages(cfg, layout, seed=seed, global_batch_size=base_batch)
    if saved is not None:
        compare_past(saved, stages)
    data = open_data(cfg, rt, model_cfg, stages, tokenizer, saved)
    contexts = make_groups(mesh, (stage.context_parallel_degree for stage in stages))
    step = 0 if saved is None else saved.step
    pinned["debug.seed"] = seed
    return Parts(mesh, model, optimizer, stages, data, contexts, checkpoints, seed, base_batch, pinned, step)


def base_global_batch_size(cfg: Config, layout: Layout, saved: TrainState | None) -> int:
    """What training.global_batch_size means: as written; for -1 what the run's first start made of it."""
    if cfg.training.global_batch_size != -1:
        return cfg.training.global_batch_size
    if saved is not None:
        return saved.global_batch_size
    first = resolve_stages(cfg, layout, seed=0)[0]
    return first.local_batch_size * first.data_ranks


def open_tokenizer(cfg: Config) -> Tokenizer | None:
    """The tokenizer at model.hf_assets_path; None without one, or where the path is absent and no text is read."""
    path = cfg.model.hf_assets_path
    if path is None:
        return None
    types = {cfg.training.dataset_type, *(stage.dataset_type for stage in cfg.training.data_stages)}
    if not Path(path).exists() and "huggingface" not in types:
        log.info("Note: model.hf_assets_path = %r does not exist; no stage reads text, so it is not needed", path)
        return None
    return load_tokenizer(path)


def with_vocabulary(cfg: Config, model: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """The model with a vocabulary that holds the tokenizer's, unless model.vocab_size says what it is."""
    if cfg.model.vocab_size is not None or tokenizer is None or tokenizer.vocab_size <= model.vocab_size:
        return model
    sizes = (tokenizer.vocab_size, model.vocab_size)
    log.info("Note: vocabulary of %d tokens, as the tokenizer's (the flavor has %d)", *sizes)
    return replace(model, vocab_size=tokenizer.vocab_size)


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
    return CheckpointManager(
        Path(cfg.job.dump_folder) / settings.folder,
        group=rt.checkpoint,
        keep_latest_k=settings.keep_latest_k,
        async_mode=settings.async_mode,
    )


def read_train_state(cfg: Config, manager: CheckpointManager | None, pinned: dict[str, Any]) -> TrainState | None:
    """The train state to go on from, or None. Raises ValueError when it is of another model, tokenizer or seed."""
    if manager is None:
        return None
    step = manager.latest_good(cfg.checkpoint.load_step)
    if step is None:
        return None
    state = TrainState.from_json(manager.train_state(step))
    problems = frozen_problems(state.pinned, pinned)
    if problems:
        raise ValueError(f"checkpoint step-{step} does not fit:\n  - " + "\n  - ".join(problems))
    return state


def make_optimizer(cfg: Config, model: build.Model) -> Optimizer:
    """The optimizer that [optimizer] describes, over this rank's shards."""
    table = cfg.optimizer
    return Optimizer(
        model.parameters,
        name=table.name,
        lr=table.lr,
        betas=(table.beta1, table.beta2),
        eps=table.eps,
        weight_decay=table.weight_decay,
        implementation=table.implementation,
    )


def load(cfg: Config, manager: CheckpointManager, model: build.Model, optimizer: Optimizer) -> TrainState | None:
    """Fill model and optimizer from the newest checkpoint whose every byte is right; its train state."""
    tensors = {**model.tensors(), **optimizer.state_tensors()}
    excluded = cfg.checkpoint.exclude_from_loading
    found = manager.load_newest(tensors, cfg.checkpoint.load_step, exclude=excluded)
    if found is None:
        return None
    step, raw = found
    state = TrainState.from_json(raw)
    optimizer.set_steps(0 if "optimizer" in excluded else int(state.optimizer["step"]))
    log.info("Resuming from checkpoint step-%d (stage '%s')", step, state.stage_name)
    return state


def compare_past(saved: TrainState, stages: tuple[Stage, ...]) -> None:
    """Refuse edits of what was trained on; print those of the future."""
    problems, edits = compare(saved.stages, stages, saved.step)
    if problems:
        raise ValueError(
            f"the configuration contradicts the checkpoint of step {saved.step}:\n  - " + "\n  - ".join(problems)
        )
    if edits:
        log.info("Changed since the checkpoint:\n  - %s", "\n  - ".join(edits))


def open_data(
    cfg: Config,
    rt: Runtime,
    model_cfg: ModelConfig,
    stages: tuple[Stage, ...],
    tokenizer: Tokenizer | None,
    saved: TrainState | None,
) -> DataEngine:
    """Open the sources of all stages, at the position of the checkpoint."""
    loader = cfg.training.dataloader
    workers = loader.num_workers
    position = None if saved is None or "dataloader" in cfg.checkpoint.exclude_from_loading else saved.dataloader_state
    return DataEngine.build(
        stages,
        group=rt.control,
        state=position,
        options=SourceOptions(
            eos_id=None if tokenizer is None else tokenizer.eos_id,
            tokenizer=tokenizer,
            cache_folder=Path(cfg.job.dump_folder) / "cache",
        ),
        vocab_size=model_cfg.vocab_size,
        num_workers=workers,
        prefetch_batches=(loader.prefetch_factor or 2) * max(workers, 1),
        pin_memory=loader.pin_memory or rt.device.type == "cuda",
        node_leader=rt.local_rank == 0,
    )


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


def consumed_tokens(stages: tuple[Stage, ...], step: int) -> int:
    """Input tokens of the first `step` updates."""
    return sum(max(0, min(step, stage.end_step) - stage.start_step) * stage.tokens_per_step for stage in stages)


def open_sinks(cfg: Config, rt: Runtime, done_steps: int) -> list[Sink]:
    """Where metrics go: metrics.jsonl on rank 0, and what [metrics] asks for on top."""
    folder = Path(cfg.job.dump_folder)
    sinks: list[Sink] = []
    if rt.is_main:
        sinks.append(JsonLines(folder / "metrics.jsonl", done_steps))
    elif cfg.metrics.save_for_all_ranks:
        sinks.append(JsonLines(folder / f"metrics-rank{rt.rank}.jsonl", done_steps))
    if rt.is_main or cfg.metrics.save_for_all_ranks:
        if cfg.metrics.enable_tensorboard:
            sinks.append(TensorBoard(folder / cfg.metrics.save_tb_folder / ("" if rt.is_main else f"rank{rt.rank}")))
        if cfg.metrics.enable_wandb:
            sinks.append(Wandb(folder / "wandb", cfg.model_dump(mode="json")))
    return sinks


def log_plan(cfg: Config, rt: Runtime, parts: Parts) -> None:
    """Everything derived, before the first update: layout, model, kernels, seed, and the stage plan."""
    layout, model = parts.mesh.layout, parts.model.cfg
    total = count_parameters(parts)
    if not rt.is_main:
        return
    log.info(
        "%s: %d ranks = pipeline %d x replicate %d x shard %d x context %d x tensor %d on %s",
        cfg.job.description, layout.world_size, layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp,
        rt.device.type,
    )  # fmt: skip
    log.info(
        "Model %s: %s parameters (dim %d, %d layers, %d heads, %d key/value heads, head dim %d, vocabulary %d%s)",
        model.name, f"{total:,}", model.dim, model.n_layers, model.n_heads, model.n_kv_heads, model.head_dim,
        model.vocab_size, ", tied" if model.tied_embeddings else "",
    )  # fmt: skip
    log.info("%s", build.describe_kernels(cfg, rt.device))
    log.info("Seed %d%s", parts.seed, "" if cfg.debug.seed is not None else " (drawn)")
    log.info(plan_text(parts.stages, lambda stage: [*stage_notes(stage), *parts.data.plan_lines(stage)]))
    if cfg.job.print_config:
        log.info("%s", cfg.model_dump_json(indent=2))
    folder = Path(cfg.job.dump_folder)
    folder.mkdir(parents=True, exist_ok=True)
    resolved = {"config": cfg.model_dump(mode="json"), "stages": [record(stage) for stage in parts.stages]}
    (folder / (cfg.job.save_config_file or "config.json")).write_text(json.dumps(resolved, indent=2) + "\n")


def count_parameters(parts: Parts) -> int:
    """Parameters of the whole model, a tied weight once."""
    mine = sum(parameter.numel() for parameter in parts.model.owned().values())
    count = torch.tensor([mine], device=next(iter(parts.model.parameters.values())).device)
    dist.all_reduce(count, group=parts.mesh.group("pp"))
    return int(count.item())
