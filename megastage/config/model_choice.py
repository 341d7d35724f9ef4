"""The model that [model] asks for: a named flavor, with overridden sizes laid over it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megastage.config.errors import ConfigError
from megastage.config.schema import Config, RopeScalingTable
from megastage.model.config import ModelConfig, RopeScaling, RopeSpec
from megastage.model.flavors import get_flavor

_SIZES = (
    "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size",
    "norm_eps", "qk_norm", "tied_embeddings", "init_std",
)  # fmt: skip

# keys of a scaling table that only one kind uses
_ONLY_FOR = {
    "low_freq_factor": "llama3",
    "high_freq_factor": "llama3",
    "beta_fast": "yarn",
    "beta_slow": "yarn",
    "attention_factor": "yarn",
}


def rope_scaling(table: RopeScalingTable) -> RopeScaling | None:
    """The scaling that a table describes; None for kind "none"."""
    return None if table.kind == "none" else RopeScaling(**table.model_dump())


def rope_spec(base: RopeSpec, theta: float | None, scaling: RopeScalingTable | None) -> RopeSpec:
    """`base` with what is set laid over it."""
    return RopeSpec(
        theta=base.theta if theta is None else theta,
        scaling=base.scaling if scaling is None else rope_scaling(scaling),
    )


def rope_scaling_problems(table: RopeScalingTable | None, path: str) -> list[str]:
    """Keys of the scaling table at `path` that its kind would ignore."""
    if table is None:
        return []
    if "kind" not in table.model_fields_set:
        return [f'{path}.kind: missing; one of "linear", "llama3", "yarn", or "none" to switch an inherited one off']
    problems = []
    for name in sorted(table.model_fields_set - {"kind"}):
        owner = _ONLY_FOR.get(name)
        if table.kind == "none" or (owner is not None and owner != table.kind):
            problems.append(f'{path}.{name}: kind "{table.kind}" does not use it; take it out')
    if table.kind != "none" and "factor" not in table.model_fields_set:
        problems.append(f'{path}.factor: missing; kind "{table.kind}" needs the factor by which the context grows')
    return problems


def model_config(cfg: Config) -> ModelConfig:
    """The model's hyper-parameters. Raises ConfigError for an unknown flavor or sizes that don't fit together."""
    model, problems = model_problems(cfg)
    if model is None:
        raise ConfigError(problems, cfg.job.config_file)
    return model


def model_problems(cfg: Config) -> tuple[ModelConfig | None, list[str]]:
    """The model's hyper-parameters, or None and why there are none."""
    table = cfg.model
    try:
        base = get_flavor(table.name, table.flavor)
    except ValueError as error:
        return None, [str(error)]
    sizes: dict[str, Any] = {name: getattr(table, name) for name in _SIZES if getattr(table, name) is not None}
    problems: list[str] = []
    if "head_dim" not in sizes and ("dim" in sizes or "n_heads" in sizes):
        dim, n_heads = sizes.get("dim", base.dim), sizes.get("n_heads", base.n_heads)
        if dim % n_heads:
            problems.append(f"model.n_heads = {n_heads}: does not divide model.dim = {dim}; set model.head_dim")
        sizes["head_dim"] = dim // n_heads
    model = replace(base, **sizes, rope=rope_spec(base.rope, table.rope_theta, table.rope_scaling))
    if model.n_heads % model.n_kv_heads:
        problems.append(
            f"model.n_kv_heads = {model.n_kv_heads}: does not divide model.n_heads = {model.n_heads}; "
            "every key/value head serves the same number of query heads"
        )
    if model.head_dim % 2:
        problems.append(f"model.head_dim = {model.head_dim}: must be even for rotary embeddings")
    return (None if problems else model), problems
