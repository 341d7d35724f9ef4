"""What must stay as it was when a run goes on from a checkpoint, apart from its stages (`stage_history`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megastage.config.errors import show
from megastage.config.model_choice import model_config
from megastage.config.schema import Config


def frozen_facts(cfg: Config, *, seed: int) -> dict[str, Any]:
    """Key -> JSON value of what a checkpoint pins: the model's sizes (RoPE is pinned per stage) and the run's seed."""
    sizes = asdict(model_config(cfg))
    del sizes["rope"], sizes["init_std"]
    return {f"model.{name}": value for name, value in sizes.items()} | {"debug.seed": seed}


def frozen_problems(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each fact that differs, naming the key and both values. Facts of one side only are passed over."""
    return [
        f"{key} was {show(saved[key])} and is {show(now[key])}: the run is to go on from a checkpoint made with the "
        "former; set it back, or start afresh in another job.dump_folder"
        for key in saved
        if key in now and saved[key] != now[key]
    ]
