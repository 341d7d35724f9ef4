"""The error of a configuration that can't be run: every problem at once."""

from __future__ import annotations

import json
from collections.abc import Sequence


class ConfigError(ValueError):
    """`problems`: one line each, naming the key, the value and the way out."""

    def __init__(self, problems: Sequence[str], where: str | None = None) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        head = f"{count} in the configuration" + (f" ({where})" if where else "")
        super().__init__("\n".join([f"{head}:", *(f"  - {problem}" for problem in self.problems)]))


def show(value: object) -> str:
    """A value as TOML writes it, shortened where it is long."""
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, list | tuple):
        text = "[" + ", ".join(show(item) for item in value) + "]"
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{bare_key(name)} = {show(item)}" for name, item in value.items()) + "}"
    else:
        text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def bare_key(name: str) -> str:
    """A key as TOML writes it: quoted where it isn't a plain word."""
    return name if name.replace("_", "a").replace("-", "a").isalnum() else json.dumps(name, ensure_ascii=False)
