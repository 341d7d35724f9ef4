"""What can be wrong between keys, with no data and no GPU at hand."""

from __future__ import annotations

import difflib

from megastage.config.errors import show
from megastage.config.layout import Layout, layout_problems, pipeline_layers
from megastage.config.model_choice import model_problems, rope_scaling_problems
from megastage.config.schema import Config
from megastage.config.stage import Stage
from megastage.config.stage_resolve import stage_problems
from megastage.model.config import ModelConfig

SCHEDULES = ("1F1B", "GPipe")
_KNOWN_SCHEDULES = ("Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "LoopedBFS", "DualPipeV")
_LOADABLE = ("optimizer", "lr_scheduler", "dataloader", "train_state")
_COMPILED = ("model", "loss")


def check(cfg: Config, world_size: int) -> list[str]:
    """Every problem between keys on `world_size` ranks, one line each; empty when the run can start."""
    layout, problems = layout_problems(cfg, world_size)
    return list(dict.fromkeys([*problems, *_problems(cfg, layout)]))


def static_problems(cfg: Config) -> list[str]:
    """As `check`, without what depends on the number of ranks."""
    return _problems(cfg, None)


def _problems(cfg: Config, layout: Layout | None) -> list[str]:
    model, problems = model_problems(cfg)
    problems = list(problems)
    problems += rope_scaling_problems(cfg.model.rope_scaling, "model.rope_scaling")
    problems += rope_scaling_problems(cfg.training.rope_scaling, "training.rope_scaling")
    stages, found = stage_problems(cfg, layout)
    problems += found
    problems += _schedule_problems(cfg)
    problems += _choice_problems(cfg)
    if model is not None:
        problems += _split_problems(cfg, model, stages)
    return list(dict.fromkeys(problems))


def _schedule_problems(cfg: Config) -> list[str]:
    """Pipeline schedules, and learning-rate keys that contradict each other."""
    problems = []
    schedule = cfg.parallelism.pipeline_parallel_schedule
    if schedule not in SCHEDULES:
        path = "parallelism.pipeline_parallel_schedule"
        close = difflib.get_close_matches(schedule.lower(), [name.lower() for name in SCHEDULES], n=1)
        reason = "not built" if schedule in _KNOWN_SCHEDULES else "not known"
        hint = next((f"; did you mean {name}?" for name in SCHEDULES if close and name.lower() == close[0]), "")
        problems.append(f'{path} = "{schedule}": is {reason}; use {" or ".join(SCHEDULES)}{hint}')
    total, steps = cfg.lr_scheduler.total_steps, cfg.training.steps
    if total is not None and total < steps:
        problems.append(
            f"lr_scheduler.total_steps = {total}: the schedule would end before training.steps = {steps}; "
            f"set it to at least {steps} or leave it out"
        )
    return problems


def _choice_problems(cfg: Config) -> list[str]:
    """Lists whose items must be of a few, and keys that need another key."""
    problems = [
        f"checkpoint.exclude_from_loading: {show(name)} is not a part of a checkpoint; use {', '.join(_LOADABLE)}"
        for name in cfg.checkpoint.exclude_from_loading
        if name not in _LOADABLE
    ]
    problems += [
        f"compile.components: {show(name)} can't be compiled on its own; use {', '.join(_COMPILED)}"
        for name in cfg.compile.components
        if name not in _COMPILED
    ]
    option = cfg.activation_checkpoint.determinism_check
    if option not in ("default", "none"):
        problems.append(f'activation_checkpoint.determinism_check = {show(option)}: must be "default" or "none"')
    if cfg.validation.steps == 0:
        problems.append("validation.steps = 0: nothing would be validated; use -1 for all of the data")
    if cfg.validation.dataset_path is not None and cfg.validation.dataset_folders:
        problems.append("validation.dataset_path and validation.dataset_folders: both set; keep one of them")
    parallel = cfg.parallelism
    if parallel.pipeline_parallel_split_points and parallel.module_fqns_per_model_part is not None:
        problems.append(
            "parallelism.pipeline_parallel_split_points and parallelism.module_fqns_per_model_part: "
            "both set; keep one of them"
        )
    loader = cfg.training.dataloader
    for name in ("prefetch_factor", "persistent_workers"):
        if loader.num_workers == 0 and getattr(loader, name):
            problems.append(
                f"training.dataloader.{name} = {show(getattr(loader, name))}: needs workers; set num_workers"
            )
    return problems


def _split_problems(cfg: Config, model: ModelConfig, stages: tuple[Stage, ...]) -> list[str]:
    """Whether heads, sequence and layers divide as tensor and pipeline parallelism split them."""
    problems = []
    tp = cfg.parallelism.tensor_parallel_degree
    path = f"parallelism.tensor_parallel_degree = {tp}"
    for name, count in (("query", model.n_heads), ("key/value", model.n_kv_heads)):
        if count % tp:
            problems.append(
                f"{path}: does not divide the {count} {name} heads of {cfg.model.name} {cfg.model.flavor}; "
                f"use one of {[d for d in range(1, count + 1) if count % d == 0]}"
            )
    for stage in stages:
        cp = stage.context_parallel_degree
        if stage.seq_len % tp:
            problems.append(
                f"{path}: does not divide seq_len = {stage.seq_len} of stage {stage.name!r} (sequence parallelism "
                f"cuts rows); use a multiple, such as {-(-stage.seq_len // tp) * tp}"
            )
        elif cp > 1 and stage.seq_len % (2 * cp * tp):
            unit = 2 * cp * tp
            problems.append(
                f"context_parallel_degree = {cp}: seq_len = {stage.seq_len} of stage {stage.name!r} can't be cut into "
                f"2 x {cp} chunks of a multiple of tensor_parallel_degree = {tp}; use a multiple of {unit}, such as "
                f"{-(-stage.seq_len // unit) * unit}"
            )
    try:
        pipeline_layers(cfg, model.n_layers)
    except ValueError as error:
        problems.append(str(error))
    return problems
