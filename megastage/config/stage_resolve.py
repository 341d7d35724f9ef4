"""[[training.data_stages]] to resolved stages: spans, data, batch, RoPE, recomputation and learning-rate keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megastage.config.errors import ConfigError, show
from megastage.config.layout import Layout
from megastage.config.model_choice import model_problems, rope_scaling_problems, rope_spec
from megastage.config.schema import Config, DataStage
from megastage.config.stage import Stage
from megastage.config.stage_data import base_weight_problems, choose_data, folder_problems
from megastage.config.stage_documents import KEYS as DOCUMENT_KEYS
from megastage.config.stage_documents import choose_documents
from megastage.config.stage_spans import Span, resolve_spans
from megastage.model.config import RopeSpec

# The keys of a stage that come from [training] (or its owner's table) when left out.
DATA_KEYS = (
    "dataset", "dataset_path", "dataset_type", "dataset_folders", "dataset_weights", "dataset_random_seed",
    "seq_len", "local_batch_size", "global_batch_size", "rope_theta", "rope_scaling", "context_parallel_degree",
    "document_mask", "recompute_mode", "recompute_option", *DOCUMENT_KEYS,
)  # fmt: skip


def resolve_stages(
    cfg: Config, layout: Layout, *, seed: int, global_batch_size: int | None = None
) -> tuple[Stage, ...]:
    """The stages of the run in order, with everything inherited filled in. Pure: reads no data, no environment.

    seed: the run's, for stages without dataset_random_seed. global_batch_size: what -1 was resolved to when the run
    first started (on resume); None resolves it now, to local_batch_size x data ranks of the first stage.
    Raises ConfigError with all problems.
    """
    stages, problems = stage_problems(cfg, layout, seed=seed, global_batch_size=global_batch_size)
    if problems:
        raise ConfigError(problems, cfg.job.config_file)
    return stages


def stage_problems(
    cfg: Config, layout: Layout | None, *, seed: int = 0, global_batch_size: int | None = None
) -> tuple[tuple[Stage, ...], list[str]]:
    """The stages and everything that is wrong with them; without a layout, batches are not checked."""
    problems: list[str] = []
    spans = resolve_spans(cfg, problems)
    problems += _list_problems(cfg)
    model, _ = model_problems(cfg)
    rope = rope_spec(RopeSpec() if model is None else model.rope, cfg.training.rope_theta, cfg.training.rope_scaling)
    stages = [_stage(cfg, span, index, rope, seed, problems) for index, span in enumerate(spans)]
    problems += [problem for span, stage in zip(spans, stages) for problem in _lr_problems(span, stage)]
    base = cfg.training.global_batch_size
    if base == 0 or base < -1:
        problems.append(f"training.global_batch_size = {base}: must be at least 1, or -1 for local_batch_size x ranks")
    elif layout is not None:
        stages = _with_batches(cfg, layout, spans, stages, global_batch_size, problems)
    return tuple(_with_jumps(stages)), list(dict.fromkeys(problems))


def _list_problems(cfg: Config) -> list[str]:
    problems = folder_problems(cfg.training.dataset_folders, "training.dataset_folders")
    problems += base_weight_problems(cfg.training)
    for index, table in enumerate(cfg.training.data_stages):
        path = f"training.data_stages[{index}]"
        problems += folder_problems(table.dataset_folders, f"{path}.dataset_folders")
        problems += [
            f'{path}.{name} = "": is empty; leave it out to inherit (stage {table.name!r})'
            for name in ("dataset", "dataset_path")
            if getattr(table, name) == ""
        ]
        problems += rope_scaling_problems(table.rope_scaling, f"{path}.rope_scaling")
    return problems


def _stage(cfg: Config, span: Span, index: int, rope: RopeSpec, seed: int, problems: list[str]) -> Stage:
    """One stage with everything but its batch."""
    base, own = cfg.training, span.table if span.table is not None else DataStage(name="default", start_step=0)
    data = choose_data(cfg, span.table, span.path, problems)
    documents = choose_documents(cfg, own, data.dataset_type, span.path, problems)
    recompute = _recompute(cfg, own, span.path, problems)

    def inherit(name: str, fallback: Any) -> Any:
        value = getattr(own, name)
        return fallback if value is None else value

    return Stage(
        index=index,
        name=span.name,
        start_step=span.start_step,
        end_step=span.end_step,
        never_runs=span.never_runs,
        declared_end_step=span.declared_end_step,
        dataset=data.dataset,
        dataset_path=data.dataset_path,
        dataset_type=data.dataset_type,
        dataset_folders=data.dataset_folders,
        dataset_weights=data.dataset_weights,
        dataset_random_seed=inherit("dataset_random_seed", inherit_seed(base.dataset_random_seed, seed)),
        seq_len=inherit("seq_len", base.seq_len),
        local_batch_size=inherit("local_batch_size", base.local_batch_size),
        global_batch_size=inherit("global_batch_size", base.global_batch_size),
        context_parallel_degree=inherit("context_parallel_degree", cfg.parallelism.context_parallel_degree),
        document_mask=inherit("document_mask", base.document_mask),
        rope=rope_spec(rope, own.rope_theta, own.rope_scaling),
        recompute=recompute,
        lr=own.lr,
        lr_end=own.lr_end,
        lr_decay_type=own.lr_decay_type,
        lr_warmup_steps=own.lr_warmup_steps,
        weight_decay=own.weight_decay,
        reset_optimizer=own.reset_optimizer,
        min_doc_len=documents.min_doc_len,
        long_doc_len=documents.long_doc_len,
        long_doc_share=documents.long_doc_share,
        inherited=frozenset(name for name in DATA_KEYS if getattr(own, name) in (None, ())),
        notes=span.notes + data.notes + documents.notes,
    )


def inherit_seed(base: int | None, run: int) -> int:
    """Seed of the data order: [training]'s own, else the run's."""
    return run if base is None else base


def _recompute(cfg: Config, own: DataStage, path: str, problems: list[str]) -> tuple[str, str]:
    table = cfg.activation_checkpoint
    mode = own.recompute_mode or table.mode
    option = own.recompute_option or table.selective_ac_option
    if own.recompute_option is not None and mode != "selective":
        problems.append(
            f'{path}.recompute_option = {show(own.recompute_option)}: recomputation mode "{mode}" takes no option; '
            'set recompute_mode = "selective" or take it out'
        )
    if mode == "selective" and option != "op" and not (option.isdigit() and int(option) >= 1):
        owner = f"{path}.recompute_option" if own.recompute_option else "activation_checkpoint.selective_ac_option"
        problems.append(f'{owner} = {show(option)}: must be "op", or n for every n-th layer, such as "2"')
    return mode, option


def _lr_problems(span: Span, stage: Stage) -> list[str]:
    """Learning-rate keys of a stage that would change nothing or can't be followed."""
    path, of = span.path, f" (stage {span.name!r})"
    problems = []
    if stage.lr_decay_type is not None and stage.lr_end is None:
        problems.append(f'{path}.lr_decay_type = "{stage.lr_decay_type}": needs lr_end, which it leads to{of}')
    if stage.lr_warmup_steps is not None and stage.lr is None:
        problems.append(f"{path}.lr_warmup_steps = {stage.lr_warmup_steps}: needs lr, which it leads to{of}")
    length = (span.declared_end_step or span.end_step) - span.start_step
    if stage.lr_warmup_steps is not None and not span.never_runs and stage.lr_warmup_steps > length > 0:
        problems.append(f"{path}.lr_warmup_steps = {stage.lr_warmup_steps}: the stage has only {length} steps{of}")
    return problems


def _with_batches(
    cfg: Config,
    layout: Layout,
    spans: Sequence[Span],
    stages: Sequence[Stage],
    saved_global: int | None,
    problems: list[str],
) -> list[Stage]:
    """The stages with global batch, data ranks and micro-batches filled in."""
    sharing = layout.dp_shard * layout.cp
    first = stages[0]
    base = cfg.training.global_batch_size
    if base == -1:
        base = saved_global or first.local_batch_size * layout.data_ranks(first.context_parallel_degree)
    result = []
    for span, stage in zip(spans, stages):
        cp = stage.context_parallel_degree
        if sharing % cp:
            problems.append(
                f"{span.path}.context_parallel_degree = {cp}: does not divide the {sharing} ranks that share data "
                f"and context (data_parallel_shard_degree {layout.dp_shard} x context {layout.cp})"
            )
            result.append(stage)
            continue
        rows = base if stage.global_batch_size == -1 else stage.global_batch_size
        ranks = layout.data_ranks(cp)
        micro, what = stage.local_batch_size, "local_batch_size"
        if layout.pp > 1:
            micro, what = cfg.parallelism.pipeline_parallel_microbatch_size, "pipeline_parallel_microbatch_size"
        if rows % (ranks * micro):
            problems.append(_does_not_divide(cfg, span, rows, ranks, micro, what))
        count = rows // (ranks * micro)
        if layout.pp > 1 and cfg.parallelism.pipeline_parallel_schedule == "1F1B" and 0 < count < layout.pp:
            problems.append(
                f"{span.path}: global_batch_size {rows} makes {count} micro-batches of {micro} on {ranks} data ranks, "
                f"but a 1F1B pipeline of {layout.pp} parts needs at least {layout.pp}; raise global_batch_size to "
                f"{ranks * micro * layout.pp}, or lower pipeline_parallel_microbatch_size"
            )
        if layout.pp > 1 and _local_is_unused(cfg, span):
            note = f"local_batch_size is not used by a pipeline, whose micro-batches have {what} = {micro} rows"
            stage = replace(stage, notes=(*stage.notes, note))
        result.append(
            replace(stage, global_batch_size=rows, data_ranks=ranks, micro_batch_size=micro, micro_batches=count)
        )
    return result


def _local_is_unused(cfg: Config, span: Span) -> bool:
    """Whether a local_batch_size that somebody wrote has no part in a pipelined stage's batch."""
    settles_global = cfg.training.global_batch_size == -1  # that of the first stage does
    own = span.table is not None and span.table.local_batch_size is not None
    if own:
        return not (settles_global and span.start_step == 0)
    return cfg.training.is_written("local_batch_size") and not settles_global


def _does_not_divide(cfg: Config, span: Span, rows: int, ranks: int, micro: int, what: str) -> str:
    """The message for a global batch that data ranks and micro-batches don't divide, with a way out."""

    def owner(name: str) -> str:
        own = span.table is not None and getattr(span.table, name) is not None
        return f"{span.path}.{name}" if own else f"training.{name}"

    micro_owner = f"parallelism.{what}" if what.startswith("pipeline") else owner(what)
    if rows % ranks == 0:
        per_rank = rows // ranks
        fitting = max(size for size in range(1, min(micro, per_rank) + 1) if per_rank % size == 0)
        where = "parallelism" if what.startswith("pipeline") else span.path
        way_out = f"set {what} = {fitting} in {where}"
    else:
        step = ranks * micro
        way_out = f"use a multiple of {step}, such as {max(step, rows // step * step)}"
    of = f" (stage {span.name!r})" if span.table is not None else ""
    return (
        f"{owner('global_batch_size')} = {rows}: does not divide into {ranks} data ranks x "
        f"{micro_owner} = {micro}{of}; {way_out}"
    )


def _with_jumps(stages: Sequence[Stage]) -> list[Stage]:
    """A note on each stage whose steps hold many times the tokens of the stage before, or many times fewer."""
    result = list(stages)
    for before, index in zip(stages, range(1, len(stages))):
        stage = stages[index]
        if before.global_batch_size <= 0 or stage.global_batch_size <= 0:
            continue
        ratio = stage.tokens_per_step / before.tokens_per_step
        if not 1 / 4 < ratio < 4:
            equal = " at an equal batch" if stage.global_batch_size == before.global_batch_size else ""
            note = (
                f"tokens per step change {ratio:g}-fold ({before.seq_len:,} -> {stage.seq_len:,} tokens a row{equal}); "
                "global_batch_size of the stage can keep them level"
            )
            result[index] = replace(stage, notes=(*stage.notes, note))
    return result
