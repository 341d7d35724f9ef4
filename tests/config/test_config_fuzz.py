"""Whatever is written: a configuration or a ConfigError, and stages that cover every step once."""

from __future__ import annotations

import datetime
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megastage.config import load
from megastage.config.checks import check
from megastage.config.fields import all_keys
from megastage.config.frozen import frozen_facts, frozen_problems
from megastage.config.layout import resolve_layout
from megastage.config.load import ConfigError, load_config
from megastage.config.model_choice import model_config
from megastage.config.schema import Config
from megastage.stages import lookup, plan_text, resolve_stages

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.integers(-2, 10), st.floats(), st.text(max_size=5),
    st.lists(st.one_of(st.integers(-2, 9), st.floats(), st.text(max_size=3), st.lists(st.text())), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), st.just(datetime.date(2026, 1, 1)),
    st.sampled_from(["None", "nanoset", "huggingface", "yarn", "full", "op", "/data", "default", "GPipe"]),
)  # fmt: skip
PATHS = st.sampled_from([*all_keys(), "job", "training", "training.data_stages.N", "quantize.linear", "nothing.here"])


def put(tables: dict[str, Any], path: str, value: Any) -> None:
    """Set one key, making tables (and up to two stages) on the way; what stands in the way is left alone."""
    node: Any = tables
    *parents, leaf = path.split(".")
    for part, following in zip(parents, [*parents[1:], leaf]):
        if part == "N":
            node = node[0]
        else:
            fresh: Any = [{"name": "a", "start_step": 0}] if following == "N" else {}
            node = node.setdefault(part, fresh) if isinstance(node, dict) else None
        if not isinstance(node, dict if following != "N" else list) or (not node and following == "N"):
            return
    if leaf == "N":
        node[0] = value
    elif value is not None:
        node[leaf] = value


def outcome(argv: list[str], world_size: int) -> tuple[Config | None, list[str]]:
    """The configuration, or what is wrong with it; any other exception is a failure of the test."""
    try:
        return load_config(argv, world_size), []
    except ConfigError as error:
        return None, error.problems


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(PATHS, VALUES), max_size=6), st.sampled_from([1, 2, 6, 64]))
def test_any_tables_load_or_are_refused(entries: list[tuple[str, Any]], world_size: int) -> None:
    tables: dict[str, Any] = {}
    for path, value in entries:
        put(tables, path, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "read_toml", lambda file: tables)
        cfg, problems = outcome(["--config", "x.toml"], world_size)
    assert (cfg is None) is bool(problems)
    assert all(problem and "\n" not in problem for problem in problems)
    if cfg is None:
        return
    assert check(cfg, world_size) == []
    stages = resolve_stages(cfg, resolve_layout(cfg, world_size), seed=0)
    assert plan_text(stages).count("\nStage ") == len(stages)


@settings(max_examples=400, deadline=None)
@given(
    steps=st.integers(1, 30),
    places=st.lists(st.tuples(st.integers(0, 35), st.one_of(st.none(), st.integers(1, 40))), min_size=1, max_size=4),
)
def test_stages_cover_every_step_once_or_are_refused(steps: int, places: list[tuple[int, int | None]]) -> None:
    """Against a literal reading of the rules: who claims each step, with open ends and the front filled in."""
    tables = [
        {"name": f"s{index}", "start_step": start} | ({} if end is None else {"end_step": end})
        for index, (start, end) in enumerate(places)
    ]
    cfg = Config.model_validate({"training": {"steps": steps, "data_stages": tables}})
    ordered = sorted(tables, key=lambda table: table["start_step"])
    horizon = max(steps, 50)
    claims: list[list[str]] = [[] for _ in range(horizon)]
    for index, table in enumerate(ordered):
        following = ordered[index + 1]["start_step"] if index + 1 < len(ordered) else horizon
        for step in range(table["start_step"], min(horizon, table.get("end_step", following))):
            claims[step].append(table["name"])
    first, last = ordered[0]["start_step"], ordered[-1]
    for step in range(min(first, horizon)):
        claims[step].append("default")
    bound = max(steps, last["start_step"] + 1)
    good = all(len(names) == 1 for names in claims[:bound])
    good &= len({table["start_step"] for table in tables}) == len(tables)
    good &= all(table.get("end_step", table["start_step"] + 1) > table["start_step"] for table in tables)
    inner = pairwise(ordered)
    good &= all(table.get("end_step", after["start_step"]) == after["start_step"] for table, after in inner)
    problems = check(cfg, 1)
    assert (problems == []) is good, problems
    if good:
        stages = resolve_stages(cfg, resolve_layout(cfg, 1), seed=0)
        assert [lookup(stages, step).name for step in range(steps)] == [claims[step][0] for step in range(steps)]
        assert sum(stage.steps for stage in stages) == steps


def test_frozen_facts_name_key_and_both_values() -> None:
    saved = frozen_facts(model_config(load_config(["--model.vocab_size", "512"])), seed=1)
    now = frozen_facts(model_config(load_config(["--model.vocab_size", "1024"])), seed=2)
    assert frozen_problems(saved, saved) == []
    vocabulary, seed = frozen_problems(saved, now)
    assert vocabulary.startswith("model.vocab_size was 512 and is 1024: ")
    assert seed.startswith("debug.seed was 1 and is 2: ")
