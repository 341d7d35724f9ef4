"""What a run would be, from its configuration and a number of ranks: no GPU, no process group, no weights."""

from __future__ import annotations

from collections.abc import Sequence

from megastage import flops, memory
from megastage.config.layout import Layout, pipeline_layers, resolve_layout
from megastage.config.model_choice import model_config
from megastage.config.schema import Config
from megastage.data.engine import DataEngine
from megastage.describe import layout_line, model_line, reshards
from megastage.model.config import ModelConfig
from megastage.model.parameters import count_parameters
from megastage.stages import Stage, plan_text, resolve_stages, stage_notes
from megastage.startup import open_tokenizer, source_options, with_vocabulary

_SIZES = {"float32": 4, "bfloat16": 2}


def estimates(cfg: Config, model: ModelConfig, layout: Layout, stage: Stage) -> tuple[memory.Breakdown, ...]:
    """Peak memory of each pipeline rank in `stage`."""
    training, master = cfg.training, _SIZES[cfg.training.dtype]
    context = stage.context_parallel_degree
    shards = layout.dp_shard * layout.cp // context  # parameters are spread over both, in every stage
    return memory.estimate(
        model,
        Layout(layout.world_size, layout.pp, layout.dp_replicate, shards, context, layout.tp),
        seq_len=stage.seq_len,
        rows=stage.micro_batch_size,
        micro_batches=stage.micro_batches,
        schedule=cfg.parallelism.pipeline_parallel_schedule,
        layers=pipeline_layers(cfg, model.n_layers),
        recompute=stage.recompute,
        reshard=reshards(cfg, layout),
        sizes=memory.Bytes(
            master=master,
            compute=_SIZES[training.mixed_precision_param],
            reduce=_SIZES[training.mixed_precision_reduce],
            optimizer=2 * master,
        ),
    )


def memory_lines(cfg: Config, model: ModelConfig, layout: Layout, stages: Sequence[Stage]) -> list[str]:
    """Estimated memory per stage and pipeline rank."""
    lines = []
    for stage in stages:
        lines.append(f"Memory in stage '{stage.name}', estimated per device:")
        lines += [f"  {line}" for line in memory.report(estimates(cfg, model, layout, stage))]
    return lines


def _work_line(model: ModelConfig, stage: Stage) -> str:
    rows = stage.global_batch_size
    step = flops.model_flops(model, stage.tokens_per_step, rows * flops.causal_pairs(stage.seq_len))
    return f"Model FLOPs: {step:.3e} per step, {step * stage.steps:.3e} in all (fewer where rows hold many documents)"


def report(cfg: Config, world_size: int, *, read_data: bool = True) -> str:
    """Layout, model, stage plan, work and memory. read_data: open all sources for epochs and skipped tokens.

    Raises ValueError for what a run would refuse.
    """
    layout = resolve_layout(cfg, world_size)
    tokenizer = open_tokenizer(cfg) if read_data else None
    model = with_vocabulary(cfg, model_config(cfg), tokenizer)
    stages = resolve_stages(cfg, layout, seed=cfg.debug.seed or 0)
    data = None
    if read_data:
        data = DataEngine.build(
            stages,
            options=source_options(cfg, tokenizer),
            vocab_size=model.vocab_size,
            superblock_tokens=cfg.training.superblock_tokens,
        )

    def extra(stage: Stage) -> list[str]:
        read = [] if data is None else data.plan_lines(stage)
        return [*stage_notes(stage), *read, _work_line(model, stage)]

    lines = [layout_line(layout), model_line(model, count_parameters(model))]
    lines += [plan_text(stages, extra), *memory_lines(cfg, model, layout, stages)]
    if data is not None:
        data.close()
    return "\n".join(lines)


def memory_report(cfg: Config, world_size: int) -> str:
    """Layout, model and memory estimate alone."""
    layout = resolve_layout(cfg, world_size)
    model = with_vocabulary(cfg, model_config(cfg), open_tokenizer(cfg))
    stages = resolve_stages(cfg, layout, seed=0)
    lines = [layout_line(layout), model_line(model, count_parameters(model))]
    return "\n".join([*lines, *memory_lines(cfg, model, layout, stages)])
