"""How many ranks go to each kind of parallelism, and how the layers go to pipeline parts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from megastage.config.errors import ConfigError
from megastage.config.schema import Config


@dataclass(frozen=True)
class Layout:
    """world_size = pp x dp_replicate x dp_shard x cp x tp ranks; `cp` is the run's degree, a stage may change it."""

    world_size: int
    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int

    @property
    def dpcp(self) -> int:
        """Ranks that share data and context: what parameters and optimizer state are spread over."""
        return self.dp_replicate * self.dp_shard * self.cp

    def data_ranks(self, cp: int) -> int:
        """Groups of ranks that read different rows, when `cp` ranks share a sequence."""
        return self.dpcp // cp


def layout_problems(cfg: Config, world_size: int) -> tuple[Layout | None, list[str]]:
    """The layout on `world_size` ranks, or None and why there is none."""
    parallel = cfg.parallelism
    pp, tp, cp = parallel.pipeline_parallel_degree, parallel.tensor_parallel_degree, parallel.context_parallel_degree
    replicate, shard = parallel.data_parallel_replicate_degree, parallel.data_parallel_shard_degree
    key = "parallelism.data_parallel_shard_degree"
    if shard == 0 or shard < -1:
        return None, [f"{key} = {shard}: must be at least 1, or -1 for all ranks that are left"]
    fixed = pp * replicate * cp * tp
    product = f"pipeline {pp} x replicate {replicate} x context {cp} x tensor {tp} = {fixed}"
    if shard == -1:
        if world_size % fixed:
            return None, [
                f"{key} = -1: {world_size} ranks can't be divided by {product}; "
                f"start a multiple of {fixed} ranks or lower a degree of [parallelism]"
            ]
        shard = world_size // fixed
    if fixed * shard != world_size:
        return None, [
            f"{key} = {shard}: {product}, x shard {shard} = {fixed * shard} ranks, but there are {world_size}; "
            f"start {fixed * shard} ranks, or set it to -1 for all that are left"
        ]
    return Layout(world_size, pp, replicate, shard, cp, tp), []


def resolve_layout(cfg: Config, world_size: int) -> Layout:
    """The layout on `world_size` ranks, with data_parallel_shard_degree = -1 inferred. Raises ConfigError."""
    layout, problems = layout_problems(cfg, world_size)
    if layout is None:
        raise ConfigError(problems, cfg.job.config_file)
    return layout


def pipeline_layers(cfg: Config, n_layers: int) -> list[range]:
    """Layers of each pipeline part, first to last. Raises ValueError naming the key that doesn't fit.

    By explicit pipeline_parallel_split_points or module_fqns_per_model_part; else even, with the embedding and the
    output head counted as so many layers (pipeline_parallel_first/last_stage_less_layers), earlier parts the longer.
    """
    parallel = cfg.parallelism
    parts = parallel.pipeline_parallel_degree
    if parallel.pipeline_parallel_split_points:
        return _from_split_points(parallel.pipeline_parallel_split_points, parts, n_layers)
    if parallel.module_fqns_per_model_part:
        return _from_module_names(parallel.module_fqns_per_model_part, parts, n_layers)
    if parts == 1:
        return [range(n_layers)]
    per_part = parallel.pipeline_parallel_layers_per_stage
    if per_part is not None and -(-n_layers // per_part) != parts:
        raise ValueError(
            f"parallelism.pipeline_parallel_layers_per_stage = {per_part}: {n_layers} layers make "
            f"{-(-n_layers // per_part)} parts, but pipeline_parallel_degree = {parts}; leave it out for an even split"
        )
    if per_part is not None:
        return [range(i * per_part, min((i + 1) * per_part, n_layers)) for i in range(parts)]
    first, last = parallel.pipeline_parallel_first_stage_less_layers, parallel.pipeline_parallel_last_stage_less_layers
    return _even(n_layers, parts, first, last)


def _even(n_layers: int, parts: int, first: int, last: int) -> list[range]:
    share, extra = divmod(n_layers + first + last, parts)
    sizes = [share + (i < extra) for i in range(parts)]
    sizes[0] -= first
    sizes[-1] -= last
    if min(sizes[0], sizes[-1]) < 0 or not all(sizes[1:-1]):
        raise ValueError(
            f"parallelism.pipeline_parallel_degree = {parts}: {n_layers} layers can't be spread over so many parts "
            f"(the embedding counts as {first}, the head as {last}); lower the degree"
        )
    starts = [sum(sizes[:i]) for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(starts)]


def _from_split_points(points: tuple[str, ...], parts: int, n_layers: int) -> list[range]:
    key = "parallelism.pipeline_parallel_split_points"
    found = [re.fullmatch(r"layers\.(\d+)", point) for point in points]
    cuts = [int(match.group(1)) for match in found if match]
    if len(cuts) != len(points) or cuts != sorted(set(cuts)) or not all(0 < cut < n_layers for cut in cuts):
        raise ValueError(
            f"{key} = {list(points)}: must be increasing names layers.1 to layers.{n_layers - 1}, "
            "each the first layer of a later part"
        )
    if len(cuts) != parts - 1:
        raise ValueError(
            f"{key} = {list(points)}: {len(cuts)} points make {len(cuts) + 1} parts, "
            f"but pipeline_parallel_degree = {parts}; give {parts - 1} points or none for an even split"
        )
    bounds = [0, *cuts, n_layers]
    return [range(a, b) for a, b in pairwise(bounds)]


def _from_module_names(names: tuple[tuple[str, ...], ...], parts: int, n_layers: int) -> list[range]:
    key = "parallelism.module_fqns_per_model_part"
    layers = [[int(n.split(".")[1]) for n in part if re.fullmatch(r"layers\.\d+", n)] for part in names]
    flat = [layer for part in layers for layer in part]
    if len(names) != parts:
        raise ValueError(f"{key}: names {len(names)} parts, but pipeline_parallel_degree = {parts}; make them agree")
    expected = ["tok_embeddings", *(f"layers.{i}" for i in range(n_layers)), "norm", "output"]
    if flat != list(range(n_layers)) or [name for part in names for name in part] != expected:
        raise ValueError(f"{key}: must name tok_embeddings, layers.0 to layers.{n_layers - 1}, norm, output in order")
    ends = [sum(len(part) for part in layers[: i + 1]) for i in range(parts)]
    return [range(a, b) for a, b in zip([0, *ends], ends)]
