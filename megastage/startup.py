"""What happens before the first update, in order: layout, model, checkpoint, stages, data, plan."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megastage import build, compiling, export, initial, resume, runtime
from megastage.checkpoint.manager import CheckpointManager
from megastage.config.frozen import frozen_facts
from megastage.config.layout import resolve_layout
from megastage.config.model_choice import model_config
from megastage.config.schema import Config
from megastage.data.engine import DataEngine
from megastage.data.sources.base import SourceOptions
from megastage.data.sources.cache import named_folder
from megastage.data.tokenizer import NoTokenizer, Tokenizer, load_tokenizer
from megastage.describe import layout_line, model_line
from megastage.kernels.dispatch import use_triton
from megastage.logs import log
from megastage.metrics import JsonLines, Sink, TensorBoard, Wandb
from megastage.model.config import ModelConfig
from megastage.optim import Kernel, Optimizer, copies_on_tp
from megastage.parallel.context import ContextGroup, make_groups
from megastage.parallel.mesh import Mesh, build_mesh
from megastage.parallel.tied import TIED
from megastage.runtime import Runtime
from megastage.stages import Stage, plan_text, record, stage_notes
from megastage.validation import Validator


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
    tokenizer: Tokenizer | None
    validator: Validator | None


def prepare(cfg: Config, rt: Runtime) -> Parts:
    """Build the run on all ranks, from the newest good checkpoint where there is one.

    Raises ValueError (on every rank) for input that can't be used.
    """
    runtime.make_writable(cfg.job.dump_folder, "job.dump_folder", rt.is_main)
    if cfg.compile.enable:
        compiling.require_backend(cfg.compile.backend)
    layout = resolve_layout(cfg, rt.world_size)
    tokenizer = open_tokenizer(cfg)
    model_cfg = with_vocabulary(cfg, model_config(cfg), tokenizer)
    mesh = build_mesh(layout, rt.device.type)
    checkpoints = resume.open_checkpoints(cfg, rt)
    source = resume.Source(cfg, rt, checkpoints)
    tokenizer_hash = None if tokenizer is None else tokenizer.sha256
    pinned = frozen_facts(model_cfg, seed=cfg.debug.seed, tokenizer_sha256=tokenizer_hash)
    saved = source.train_state(pinned)
    fresh = "train_state" in source.excluded
    seed = resume.resolve_seed(cfg, rt, None if fresh else saved)
    runtime.seed_everything(seed)
    base_batch, stages = resume.settle(cfg, layout, seed, None if fresh else saved)
    model = build.build_model(cfg, model_cfg, mesh, rt.device)
    optimizer = make_optimizer(cfg, model, optimizer_kernel(cfg, model, mesh, seed, rt.device))
    if saved is not None:
        expected, saved = saved, source.load(model, optimizer)
        if saved is None or saved.step != expected.step:  # its bytes were damaged, an older one was loaded
            base_batch, stages = resume.settle(cfg, layout, seed, None if fresh else saved)
    if saved is None:
        initial.fill(cfg, rt, model, seed)
    saved = None if fresh else saved
    position = None if saved is None or "dataloader" in source.excluded else saved.dataloader_state
    options = source_options(cfg, tokenizer)
    data = open_data(cfg, rt, model_cfg, stages, options, position)
    validator = Validator(cfg, rt, stages, options, model_cfg.vocab_size) if cfg.validation.enable else None
    if cfg.compile.enable:
        compiling.allow_for(stages, model_cfg.n_layers)
    contexts = make_groups(mesh, (stage.context_parallel_degree for stage in stages))
    step = 0 if saved is None else saved.step
    if step < cfg.training.steps:
        export.refuse_existing(cfg, rt)
    pinned["debug.seed"] = seed
    if checkpoints is not None and source.own_step is not None and not cfg.checkpoint.load_only:
        checkpoints.supersede_later(step)
    return Parts(
        mesh,
        model,
        optimizer,
        stages,
        data,
        contexts,
        checkpoints,
        seed,
        base_batch,
        pinned,
        step,
        tokenizer,
        validator,
    )


def open_tokenizer(cfg: Config) -> Tokenizer | None:
    """The tokenizer at model.hf_assets_path; None without one, or where none lies there and no text is read."""
    path = cfg.model.hf_assets_path
    if path is None:
        return None
    types = {cfg.training.dataset_type, *(stage.dataset_type for stage in cfg.training.data_stages)}
    types |= {cfg.validation.dataset_type} if cfg.validation.enable else set()
    try:
        return load_tokenizer(path)
    except ValueError as error:
        if isinstance(error, NoTokenizer) and "huggingface" not in types:
            log.info("Note: model.hf_assets_path = %r holds no tokenizer; no stage reads text, so none is needed", path)
            return None
        raise ValueError(f'model.hf_assets_path = "{path}": {error}') from error


def with_vocabulary(cfg: Config, model: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """The model with a vocabulary that holds the tokenizer's, unless model.vocab_size says what it is."""
    if cfg.model.vocab_size is not None or tokenizer is None or tokenizer.vocab_size <= model.vocab_size:
        return model
    sizes = (tokenizer.vocab_size, model.vocab_size)
    log.info("Note: vocabulary of %d tokens, as the tokenizer's (the flavor has %d)", *sizes)
    return replace(model, vocab_size=tokenizer.vocab_size)


def optimizer_kernel(cfg: Config, model: build.Model, mesh: Mesh, seed: int, device: torch.device) -> Kernel | None:
    """How to run the kernel that stands for optimizer.implementation "fused": on GPUs, and on any device where
    parameters are kept in bf16, whose small updates torch's rounding would lose. None: torch's own."""
    stochastic = cfg.training.dtype == "bfloat16"
    triton = use_triton(cfg.kernels.optimizer, device, "optimizer")
    if cfg.optimizer.implementation != "fused" or not (triton or stochastic):
        return None
    shard, tp, pp = (mesh.root.get_local_rank(name) for name in ("shard", "tp", "pp"))

    def group_of(name: str) -> str:
        tp_part = "all" if copies_on_tp(model.parameters[name]) else tp
        pp_part = "all" if model.cfg.tied_embeddings and name == TIED else pp
        return f"{shard}/{tp_part}/{pp_part}"

    return Kernel(cfg.kernels.optimizer, stochastic, seed, group_of)


def make_optimizer(cfg: Config, model: build.Model, kernel: Kernel | None) -> Optimizer:
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
        kernel=kernel,
    )


def source_options(cfg: Config, tokenizer: Tokenizer | None) -> SourceOptions:
    """What readers of data need beside the path."""
    return SourceOptions(
        eos_id=None if tokenizer is None else tokenizer.eos_id,
        tokenizer=tokenizer,
        cache_folder=named_folder(Path(cfg.job.dump_folder) / "cache"),
        live_bytes=cfg.training.live_text_mb * 1_000_000,
    )


def open_data(
    cfg: Config,
    rt: Runtime,
    model_cfg: ModelConfig,
    stages: tuple[Stage, ...],
    options: SourceOptions,
    position: dict[str, Any] | None,
) -> DataEngine:
    """Open the sources of all stages, at the position of the checkpoint."""
    loader = cfg.training.dataloader
    workers = loader.num_workers
    return DataEngine.build(
        stages,
        group=rt.control,
        state=position,
        options=options,
        vocab_size=model_cfg.vocab_size,
        num_workers=workers,
        prefetch_batches=(loader.prefetch_factor or 2) * max(workers, 1),
        pin_memory=loader.pin_memory or rt.device.type == "cuda",
        node_leader=rt.local_rank == 0,
        superblock_tokens=cfg.training.superblock_tokens,
    )


def consumed_tokens(stages: tuple[Stage, ...], step: int) -> int:
    """Input tokens of the first `step` updates."""
    return sum(max(0, min(step, stage.end_step) - stage.start_step) * stage.tokens_per_step for stage in stages)


def open_sinks(cfg: Config, rt: Runtime, done_steps: int) -> list[Sink]:
    """Where metrics go: metrics.jsonl on rank 0, and what [metrics] asks for on top."""
    folder = Path(cfg.job.dump_folder)
    sinks: list[Sink] = []
    if rt.is_main or cfg.metrics.save_for_all_ranks:
        name = "metrics.jsonl" if rt.is_main else f"metrics-rank{rt.rank}.jsonl"
        rewound = cfg.checkpoint.load_step >= 0 and rt.restarts == 0
        sinks.append(JsonLines(folder / name, done_steps, rewound=rewound))
        if cfg.metrics.enable_tensorboard:
            mine = "" if rt.is_main else f"rank{rt.rank}"
            sinks.append(TensorBoard(folder / cfg.metrics.save_tb_folder / mine, done_steps))
        if cfg.metrics.enable_wandb:
            sinks.append(Wandb(folder / "wandb", cfg.model_dump(mode="json")))
    return sinks


def log_plan(cfg: Config, rt: Runtime, parts: Parts) -> None:
    """Everything derived, before the first update: layout, model, kernels, seed, and the stage plan."""
    layout, model = parts.mesh.layout, parts.model.cfg
    total = count_parameters(parts)
    if not rt.is_main:
        return
    log.info("%s: %s on %s", cfg.job.description, layout_line(layout), rt.device.type)
    log.info("%s", model_line(model, total))
    log.info("%s", build.describe_kernels(cfg, rt.device))
    log.info("Seed %d%s", parts.seed, "" if cfg.debug.seed is not None else " (drawn)")
    log.info(plan_text(parts.stages, lambda stage: [*stage_notes(stage), *parts.data.plan_lines(stage)]))
    if cfg.job.print_config:
        log.info("%s", cfg.model_dump_json(indent=2))
    target = Path(cfg.job.dump_folder) / (cfg.job.save_config_file or "config.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    resolved = {"config": cfg.model_dump(mode="json"), "stages": [record(stage) for stage in parts.stages]}
    target.write_text(json.dumps(resolved, indent=2) + "\n")


def count_parameters(parts: Parts) -> int:
    """Parameters of the whole model, a tied weight once."""
    mine = sum(parameter.numel() for parameter in parts.model.owned().values())
    count = torch.tensor([mine], device=next(iter(parts.model.parameters.values())).device)
    dist.all_reduce(count, group=parts.mesh.group("pp"))
    return int(count.item())
