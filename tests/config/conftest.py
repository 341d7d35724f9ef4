"""What the tests of the configuration share."""

from __future__ import annotations

from pathlib import Path

import pytest

from megastage.config.load import load_config
from megastage.config.schema import Config


@pytest.fixture
def load(tmp_path: Path):
    def load(text: str, *arguments: str) -> Config:
        file = tmp_path / "c.toml"
        file.write_text(text)
        return load_config(["--config", str(file), *arguments])

    return load
