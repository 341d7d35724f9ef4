"""Everything of a run that is not a tensor, as one JSON object with a version."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any

import torch

import megastage

VERSION = 1


@dataclass
class TrainState:
    """State of training after `step` completed updates, as it stands in train_state.json.

    stage_idx, stage_name: the stage of the next update (0-based; the last stage at the end of the run).
    dataloader_state: position in the data, opaque here; it comes from the data engine.
    consumed_samples, consumed_tokens: {stage name: {source name: count}}; rows, and input tokens in them.
    seed: the run's resolved seed. global_batch_size: what training.global_batch_size = -1 was resolved to.
    optimizer: {"step": updates done}, for bias correction.
    config: the configuration. stages: a `megastage.stages.record` each, to prove on resume that the past is the same.
    pinned: from `megastage.config.frozen`: what a run that goes on from here must not change.
    layout: world size and parallel degrees at the save; for information, another layout may resume.
    """

    step: int
    stage_idx: int
    stage_name: str
    seed: int
    dataloader_state: dict[str, Any] = field(default_factory=dict)
    consumed_samples: dict[str, dict[str, int]] = field(default_factory=dict)
    consumed_tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    global_batch_size: int = 0
    optimizer: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    pinned: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, int] = field(default_factory=dict)
    torch_version: str = str(torch.__version__)
    megastage_version: str = megastage.__version__
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        """A JSON object; tuples become lists."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainState:
        """The inverse of to_json. Raises ValueError listing every unknown, missing or wrongly typed field."""
        if data.get("version") != VERSION:
            raise ValueError(
                f"train state: version {data.get('version')!r} of megastage {data.get('megastage_version', '?')}, "
                f"this megastage ({megastage.__version__}) reads version {VERSION}"
            )
        types_of = typing.get_type_hints(cls)
        problems = [f"unknown field {name!r}" for name in data if name not in types_of]
        for name, expected in types_of.items():
            if name not in data:
                problems.append(f"missing field {name!r}")
            elif reason := _misfit(data[name], expected):
                problems.append(f"field {name!r}: {reason}")
        if problems:
            raise ValueError(f"train state: {'; '.join(problems)}")
        return cls(**data)


def _misfit(value: Any, expected: Any) -> str:
    """Why a JSON value is not of a type annotation; empty if it is."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return ""
    if origin is dict:
        if not isinstance(value, dict):
            return f"an object was expected, not {value!r}"
        return next((f"{k}: {why}" for k, v in value.items() if (why := _misfit(v, arguments[1]))), "")
    if origin is list:
        if not isinstance(value, list):
            return f"a list was expected, not {value!r}"
        return next((why for v in value if (why := _misfit(v, arguments[0]))), "")
    allowed = (int, float) if expected is float else (expected,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and expected is not bool):
        return f"{expected.__name__} was expected, not {value!r}"
    return ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
