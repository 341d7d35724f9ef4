"""Every shipped configuration loads, resolves and plans at the number of ranks that its README names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megastage.config.layout import pipeline_layers, resolve_layout
from megastage.config.load import load_config
from megastage.config.model_choice import model_config
from megastage.schedule import Schedule
from megastage.stages import plan_text, resolve_stages

FOLDER = Path(__file__).resolve().parents[2] / "configs"
ROWS = re.findall(r"^\| `(\w+\.toml)` \| (\d+) \| (.+) \|$", (FOLDER / "README.md").read_text(), re.M)


def test_each_file_has_its_line() -> None:
    assert sorted(name for name, _, _ in ROWS) == sorted(file.name for file in FOLDER.glob("*.toml"))


@pytest.mark.parametrize(("name", "ranks", "_line"), ROWS, ids=[name for name, _, _ in ROWS])
def test_it_loads_resolves_and_plans(name: str, ranks: str, _line: str) -> None:
    cfg = load_config(["--config", str(FOLDER / name)], world_size=int(ranks))
    layout = resolve_layout(cfg, int(ranks))
    stages = resolve_stages(cfg, layout, seed=1)
    assert len(plan_text(stages).splitlines()) > 8
    assert not any("not used" in note for stage in stages for note in stage.notes)
    assert len(pipeline_layers(cfg, model_config(cfg).n_layers)) == layout.pp
    schedule = Schedule(cfg, stages)
    assert all(0 <= schedule.lr(step) <= 1e-2 for stage in stages for step in (stage.start_step, stage.end_step - 1))
    assert schedule.lr(0) > 0
