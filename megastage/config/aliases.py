"""First-generation key names and the canonical (second-generation) keys they stand for."""

from __future__ import annotations

from typing import Any

ALIASES: dict[str, str] = {
    "job.print_args": "job.print_config",
    "model.tokenizer_path": "model.hf_assets_path",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "training.compile": "compile.enable",
    "training.seed": "debug.seed",
    "training.deterministic": "debug.deterministic",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "checkpoint.initial_load_model_weights_only": "checkpoint.initial_load_model_only",
    "checkpoint.last_save_model_weights_only": "checkpoint.last_save_model_only",
    "memory_estimation.enabled": "memory_estimation.enable",
}


def canonical(tables: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """A copy of `tables` under canonical names, which names were written for them, and the keys given twice.

    Tables are copied one level deep, which is all that renaming touches: the caller's dict stays as it was.
    """
    result = {name: dict(table) if isinstance(table, dict) else table for name, table in tables.items()}
    written: dict[str, str] = {}
    problems: list[str] = []
    for alias, name in ALIASES.items():
        (old_table, old_key), (new_table, new_key) = alias.split("."), name.split(".")
        source = result.get(old_table)
        if not isinstance(source, dict) or old_key not in source:
            continue
        value = source.pop(old_key)
        target = result.setdefault(new_table, {})
        if not isinstance(target, dict):
            continue
        if new_key in target:
            problems.append(f"{alias} and {name}: two names for one key, both set; keep {name} alone")
            continue
        target[new_key] = value
        written[name] = alias
    return result, written, problems
