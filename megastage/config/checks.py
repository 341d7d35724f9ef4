"""What can be wrong between keys, with no data and no GPU at hand."""

from __future__ import annotations

import difflib
import math
from pathlib import Path

from megastage.config.errors import show
from megastage.config.fields import all_keys
from megastage.config.layout import Layout, layout_problems, pipeline_layers
from megastage.config.model_choice import model_problems, rope_scaling_problems
from megastage.config.schema import Config
from megastage.config.stage import Stage
from megastage.config.stage_data import folder_problems
from megastage.config.stage_resolve import stage_problems
from megastage.config.unbuilt import unbuilt_problems
from megastage.model.config import ModelConfig

SCHEDULES = ("1F1B", "GPipe")
_KNOWN_SCHEDULES = ("Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "LoopedBFS", "DualPipeV")
_LOADABLE = ("optimizer", "lr_scheduler", "dataloader", "train_state")
_COMPILED = ("model", "loss")
_MAY_BE_EMPTY = ("job.description", "comm.save_traces_file_prefix", "model.flavor", "model.name")


def check(cfg: Config, world_size: int) -> list[str]:
    """Every problem between keys on `world_size` ranks, one line each; empty when the run can start."""
    layout, problems = layout_problems(cfg, world_size)
    if cfg.checkpoint.create_seed_checkpoint and world_size > 1:
        problems.append(
            f"checkpoint.create_seed_checkpoint = true: {world_size} ranks; start one process with every degree of "
            "[parallelism] at 1, any layout can go on from what it writes"
        )
    return list(dict.fromkeys([*problems, *_problems(cfg, layout)]))


def static_problems(cfg: Config) -> list[str]:
    """As `check`, without what depends on the number of ranks."""
    return _problems(cfg, None)


def _problems(cfg: Config, layout: Layout | None) -> list[str]:
    model, found = model_problems(cfg)
    # what -1 stands for lies in the checkpoint that the run goes on from: batches are checked once that is read
    settled_later = cfg.training.global_batch_size == -1 and _goes_on(cfg)
    stages, of_stages = stage_problems(cfg, None if settled_later else layout)
    problems = [*found, *of_stages, *_other_problems(cfg)]
    if model is not None:
        problems += _split_problems(cfg, model, stages)
    return list(dict.fromkeys(problems))


def remaining_problems(cfg: Config) -> list[str]:
    """As `check`, without what depends on the number of ranks, or on how the model is split over them."""
    return list(dict.fromkeys([*stage_problems(cfg, None)[1], *_other_problems(cfg)]))


def _other_problems(cfg: Config) -> list[str]:
    """What stages, model and layout have no part in."""
    return [
        *unbuilt_problems(cfg),
        *_empty_strings(cfg),
        *rope_scaling_problems(cfg.model.rope_scaling, "model.rope_scaling"),
        *rope_scaling_problems(cfg.training.rope_scaling, "training.rope_scaling"),
        *_schedule_problems(cfg),
        *_choice_problems(cfg),
    ]


def _empty_strings(cfg: Config) -> list[str]:
    """Names, files and folders given as "": they would stand for whatever folder the job happens to start in."""
    return [
        f'{path} = "": is empty; leave it out'
        for path, info in all_keys().items()
        if info.annotation is str and info.default != "" and ".N." not in path and path not in _MAY_BE_EMPTY
        if cfg.is_set(path) and cfg.value(path) == ""
    ]


def _goes_on(cfg: Config) -> bool:
    """Whether there is something that looks like a checkpoint with a train state to go on from."""
    table = cfg.checkpoint
    if table.initial_load_path is not None and not table.initial_load_model_only:
        return True
    return table.enable and any(Path(cfg.job.dump_folder, table.folder).glob("step-*"))


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
    problems += _checkpoint_problems(cfg)
    profiling = cfg.profiling
    if profiling.enable_profiling and profiling.profile_freq < profiling.profiler_warmup + profiling.profiler_active:
        problems.append(
            f"profiling.profile_freq = {profiling.profile_freq}: must be at least profiler_warmup + profiler_active = "
            f"{profiling.profiler_warmup + profiling.profiler_active}"
        )
    implementation = cfg.optimizer.implementation
    if cfg.kernels.optimizer == "triton" and implementation != "fused":
        problems.append(
            f'kernels.optimizer = "triton" and optimizer.implementation = "{implementation}": contradict each other; '
            'the kernel is a form of "fused"'
        )
    if cfg.debug.deterministic_warn_only and not cfg.debug.deterministic:
        problems.append("debug.deterministic_warn_only = true: needs debug.deterministic = true")
    option = cfg.activation_checkpoint.determinism_check
    if option not in ("default", "none"):
        problems.append(f'activation_checkpoint.determinism_check = {show(option)}: must be "default" or "none"')
    problems += _validation_problems(cfg)
    training = cfg.training
    types = {training.dataset_type, *(stage.dataset_type for stage in training.data_stages)}
    if training.is_written("live_text_mb") and "huggingface" not in types:
        problems.append(f"training.live_text_mb = {training.live_text_mb}: no stage reads text; leave it out")
    parallel = cfg.parallelism
    if parallel.pipeline_parallel_split_points and parallel.module_fqns_per_model_part:
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


def _validation_problems(cfg: Config) -> list[str]:
    """Keys of [validation] that contradict each other; what it needs is asked for only where it is enabled."""
    table, problems = cfg.validation, []
    if table.steps == 0:
        problems.append("validation.steps = 0: nothing would be validated; use -1 for all of the data")
    if table.dataset_path is not None and table.dataset_folders:
        problems.append("validation.dataset_path and validation.dataset_folders: both set; keep one of them")
    if not table.enable:
        return problems
    problems += folder_problems(table.dataset_folders, "validation.dataset_folders")
    kind = table.dataset_type or cfg.training.dataset_type
    placed = table.dataset_path is not None or bool(table.dataset_folders)
    if kind != "huggingface" and not placed:
        problems.append(f'validation: dataset_type "{kind}" needs data; set dataset_folders or dataset_path')
    if table.is_written("dataset") and kind != "huggingface":
        problems.append(
            f'validation.dataset = {show(table.dataset)}: dataset_type "{kind}" takes no dataset name; '
            "use dataset_path or dataset_folders"
        )
    rows = cfg.parallelism.pipeline_parallel_microbatch_size
    if cfg.parallelism.pipeline_parallel_degree > 1 and table.local_batch_size % rows:
        problems.append(
            f"validation.local_batch_size = {table.local_batch_size}: must be a multiple of "
            f"parallelism.pipeline_parallel_microbatch_size = {rows}"
        )
    loader = table.dataloader
    problems += [
        f"validation.dataloader.{name} = {show(getattr(loader, name))}: needs workers; set num_workers"
        for name in ("prefetch_factor", "persistent_workers")
        if loader.num_workers == 0 and getattr(loader, name)
    ]
    return problems


def _checkpoint_problems(cfg: Config) -> list[str]:
    """Keys of [checkpoint] that contradict each other, or would do nothing."""
    table, problems = cfg.checkpoint, []
    if "lr_scheduler" in table.exclude_from_loading:
        problems.append(
            'checkpoint.exclude_from_loading: "lr_scheduler": the learning rate is a function of the step and never '
            "loaded; give a stage its own lr to begin a new segment"
        )
    if "train_state" in table.exclude_from_loading and table.initial_load_path is None:
        problems.append(
            'checkpoint.exclude_from_loading: "train_state": a run can\'t forget its own steps; set initial_load_path '
            "to its checkpoint and initial_load_model_only = false, in a new job.dump_folder"
        )
    if "train_state" in table.exclude_from_loading and "dataloader" not in table.exclude_from_loading:
        problems.append(
            'checkpoint.exclude_from_loading: "train_state": the position in the data belongs to the step; '
            'exclude "dataloader" too'
        )
    if table.exclude_from_loading and table.initial_load_path is not None and table.initial_load_model_only:
        problems.append(
            "checkpoint.exclude_from_loading: nothing but the model is loaded from initial_load_path, and a restarted "
            "run loads all of its own; take it out, or set initial_load_model_only = false"
        )
    if not table.initial_load_model_only and (table.initial_load_path is None or table.initial_load_in_hf):
        why = "Hugging Face weights are a model alone" if table.initial_load_in_hf else "needs initial_load_path"
        problems.append(f"checkpoint.initial_load_model_only = false: {why}")
    if table.last_save_in_hf and not table.last_save_model_only:
        problems.append(
            "checkpoint.last_save_in_hf = true: Hugging Face weights hold no optimizer; set last_save_model_only = true"
            " too, or use checkpoint.export to have both"
        )
    if table.initial_load_in_hf and table.initial_load_path is None and cfg.model.hf_assets_path is None:
        problems.append(
            "checkpoint.initial_load_in_hf = true: set checkpoint.initial_load_path or model.hf_assets_path to the "
            "folder that holds config.json and *.safetensors"
        )
    problems += [
        f"checkpoint.{name} = {show(getattr(table, name))}: needs checkpoint.enable = true, without which the run "
        "starts from scratch and saves nothing"
        for name, off in (("create_seed_checkpoint", False), ("load_only", False), ("load_step", -1))
        if getattr(table, name) != off and not table.enable
    ]
    if table.exclude_from_loading and not table.enable and table.initial_load_path is None:
        problems.append(
            f"checkpoint.exclude_from_loading = {show(table.exclude_from_loading)}: nothing is loaded; "
            "set checkpoint.enable = true or checkpoint.initial_load_path"
        )
    if table.create_seed_checkpoint and table.load_only:
        problems.append("checkpoint.create_seed_checkpoint and checkpoint.load_only: both set; keep one of them")
    used = table.last_save_model_only or table.export is not None
    if table.enable and table.export_dtype != "float32" and not used:
        problems.append(
            f'checkpoint.export_dtype = "{table.export_dtype}": nothing is exported; '
            "set checkpoint.export or last_save_model_only"
        )
    return problems


def _split_problems(cfg: Config, model: ModelConfig, stages: tuple[Stage, ...]) -> list[str]:
    """Whether heads, sequence and layers divide as tensor and pipeline parallelism split them."""
    problems = []
    tp = cfg.parallelism.tensor_parallel_degree
    path = f"parallelism.tensor_parallel_degree = {tp}"
    heads, shared = model.n_heads, model.n_kv_heads
    fitting = [d for d in range(1, heads + 1) if heads % d == 0 and (shared % d == 0 or d % shared == 0)]
    if tp not in fitting:
        problems.append(
            f"{path}: {cfg.model.name} {cfg.model.flavor} has {heads} query heads, which it must divide, and {shared} "
            f"key/value heads, of which it must be a divisor or a multiple; use one of {fitting}"
        )
    if cfg.parallelism.disable_loss_parallel and model.vocab_size % tp:
        problems.append(
            f"parallelism.disable_loss_parallel = true: the vocabulary of {model.vocab_size} can't be gathered evenly "
            f"from {tp} tensor-parallel ranks; set model.vocab_size = {-(-model.vocab_size // tp) * tp}"
        )
    if cfg.validation.enable:
        length = cfg.validation.seq_len
        degrees = {stage.context_parallel_degree for stage in stages}
        unit = math.lcm(*(tp if cp == 1 else 2 * cp * tp for cp in degrees))
        if length % unit:
            problems.append(
                f"validation.seq_len = {length}: tensor and context parallelism cut rows; use a multiple of {unit}, "
                f"such as {-(-length // unit) * unit}"
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
