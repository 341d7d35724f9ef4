"""What can be checked of a configuration while some of its values can't be used, so that all problems come at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megastage.config.checks import check, remaining_problems
from megastage.config.schema import Config

_LAID_OUT = ("model", "parallelism")  # with a wrong value here nothing can be said about how the model is split


def salvage(
    tables: dict[str, Any], errors: Sequence[ErrorDetails], world_size: int | None
) -> tuple[Config | None, list[str]]:
    """What is left of a configuration, and the problems that stand whatever the values in `errors` should have been.

    The wrong values are taken out, so that their keys are at their defaults; what is then said of such a key, or
    could follow from its default, is left out.
    """
    dropped: set[tuple[str, str]] = set()
    rest: dict[str, Any] = {**tables}
    for table in {str(error["loc"][0]) for error in errors}:
        rest[table] = _copy(tables[table])
    for error in errors:
        dropped.add(_drop(rest, error["loc"]))
    try:
        cfg = Config.model_validate(rest)
    except ValidationError:  # two wrong values in one place
        return None, []
    broken = {str(error["loc"][0]) for error in errors}
    if world_size is None or broken & set(_LAID_OUT):
        found = remaining_problems(cfg)
    else:
        found = check(cfg, world_size)
    return cfg, [problem for problem in found if not any(_is_about(problem, *key) for key in dropped)]


def _is_about(problem: str, place: str, key: str) -> bool:
    """Whether a problem of the stage at `place` ("": of anything) speaks of `key`."""
    return problem.startswith(place) and re.search(rf"\b{key}\b", problem) is not None


def _copy(value: Any) -> Any:
    """Tables and lists copied, so that values can be taken out."""
    if isinstance(value, dict):
        return {name: _copy(entry) for name, entry in value.items()}
    return [_copy(entry) for entry in value] if isinstance(value, list) else value


def _drop(tables: dict[str, Any], loc: tuple[int | str, ...]) -> tuple[str, str]:
    """Take the value at `loc` out of `tables`; the stage, or "", and the name of the key that is now at its default."""
    if len(loc) == 1:
        tables.pop(str(loc[0]), None)
        return "", str(loc[0])
    table, key = tables.get(str(loc[0]), {}), str(loc[1])
    stages = table.get(key)
    if key == "data_stages" and isinstance(stages, list) and len(loc) > 3 and loc[3] != "start_step":
        stage, leaf = stages[int(loc[2])], str(loc[3])
        stage.pop(leaf, None)
        if leaf == "name":  # no name would be wrong again
            stage["name"] = f"number {loc[2]}"
        return f"training.data_stages[{loc[2]}]", leaf
    table.pop(key, None)
    return "", key
