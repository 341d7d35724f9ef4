"""What must stay as it was when a run goes on from a checkpoint, apart from its stages (`stage_history`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megastage.config.errors import show
from megastage.model.config import ModelConfig


def frozen_facts(model: ModelConfig, *, seed: int | None, tokenizer_sha256: str | None = None) -> dict[str, Any]:
    """Key -> JSON value of what a checkpoint pins: the model's sizes (RoPE is pinned per stage), seed and tokenizer.

    What is not known (None) is left out.
    """
    sizes = asdict(model)
    del sizes["rope"], sizes["init_std"]
    facts = {f"model.{name}": value for name, value in sizes.items()}
    known = {"debug.seed": seed, "the tokenizer's sha256 (model.hf_assets_path)": tokenizer_sha256}
    return facts | {key: value for key, value in known.items() if value is not None}


def frozen_problems(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each fact that differs, naming the key and both values. Facts of one side only are passed over."""
    return [
        f"{key} was {show(saved[key])} and is {show(now[key])}: the run is to go on from a checkpoint made with the "
        "former; set it back, or start afresh in another job.dump_folder"
        for key in saved
        if key in now and saved[key] != now[key]
    ]
