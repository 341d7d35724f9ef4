"""The commands of the README run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _commands() -> list[str]:
    section = (ROOT / "README.md").read_text().split("## Use it")[1]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block
    return block[1].strip().splitlines()


@pytest.mark.dist
def test_the_commands_run(tmp_path):
    for name in ("tools", "megastage", "kernels", "configs", "pretrain.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "corpus").mkdir()
    lines = [json.dumps({"text": f"Sentence {i} of a small corpus, about {i * i} things."}) for i in range(500)]
    (tmp_path / "corpus" / "a.jsonl").write_text("\n".join(lines))
    bin_folder = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    commands = _commands()
    assert len(commands) >= 4
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "data" / "web" / "metadata.json").exists()
    assert (tmp_path / "outputs" / "metrics.jsonl").read_text().count("\n") == 4


def test_the_pages_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
