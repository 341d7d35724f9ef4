"""`--section.key value` on the command line, laid over the tables of the file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megastage.config.errors import show
from megastage.config.fields import find, nearest, parse_text, type_name


@dataclass(frozen=True)
class Arguments:
    """The command line taken apart: values by dotted key path as written, and what was wrong with it."""

    config_file: str | None
    values: dict[str, Any]
    problems: list[str]
    wants_help: bool


def read_arguments(argv: Sequence[str]) -> Arguments:
    """Take `argv` (without the program's name) apart: `--key value`, `--key=value`, `--flag`, `--table.no-flag`."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    wants_help = False
    queue = list(argv)
    while queue:
        token = queue.pop(0)
        if token in ("-h", "--help"):
            wants_help = True
            continue
        if not token.startswith("--") or token == "--":
            hint = "; the configuration is given as --config FILE" if token.endswith(".toml") else ""
            problems.append(f"command line: {token!r} is not of the form --section.key value{hint}")
            continue
        name, has_value, text = token[2:].partition("=")
        path, negated = _key_path(name)
        info = find(path)
        if info is None:
            _drop_value(queue, bool(has_value))
            close = nearest(path)
            problems.append(f"command line: --{name} is not a known key{f'; did you mean --{close}?' if close else ''}")
            continue
        if not has_value:
            if info.annotation is bool:
                takes_next = not negated and bool(queue) and queue[0].lower() in ("true", "false")
                text = queue.pop(0) if takes_next else "true"
            elif queue and not queue[0].startswith("--"):
                text = queue.pop(0)
            else:
                problems.append(f"command line: --{name} needs a value ({type_name(info.annotation)})")
                continue
        try:
            value = parse_text(info.annotation, text)
            if path == "job.config_file" and values.get(path, value) != value:
                problems.append(
                    f"command line: --config is given twice, {show(values[path])} and {show(value)}; keep one"
                )
            values[path] = (not value) if negated else value
        except ValueError as error:
            hint = "; leave the key out for its default" if text in ("None", "null") else ""
            problems.append(f"command line: --{name} {show(text)}: {error}{hint}")
    config_file = values.pop("job.config_file", None)
    return Arguments(config_file, values, problems, wants_help)


def _key_path(name: str) -> tuple[str, bool]:
    """Dotted path of an option's name, and whether it is a negated flag (`checkpoint.no-enable`)."""
    if name == "config":
        return "job.config_file", False
    path = name.replace("-", "_")
    table, _, leaf = path.rpartition(".")
    if find(path) is None and leaf.startswith("no_"):
        positive = f"{table}.{leaf[3:]}"
        info = find(positive)
        if info is not None and info.annotation is bool:
            return positive, True
    return path, False


def _drop_value(queue: list[str], has_value: bool) -> None:
    if not has_value and queue and not queue[0].startswith("--"):
        queue.pop(0)


def nested(values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Dotted paths as nested tables; numbered items of a list become a dict keyed by int."""
    tables: dict[str, Any] = {}
    for path, value in values.items():
        *parents, leaf = path.split(".")
        node: Any = tables
        for part in parents:
            node = node.setdefault(int(part) if part.isdigit() else part, {}) if isinstance(node, dict) else None
        if isinstance(node, dict) and not isinstance(node.get(leaf), dict):
            node[leaf] = value
        else:
            problems.append(f"command line: --{path}: also given as a whole; give either the whole or its parts")
    return tables


def lay_over(base: Any, top: Any, path: str, problems: list[str]) -> Any:
    """`base` with `top` laid over it, as new objects. A dict keyed by int changes single items of a list."""
    if not isinstance(top, dict):
        return copy.deepcopy(top)
    if top and all(isinstance(name, int) for name in top):
        return _lay_over_list(base, top, path, problems)
    result = dict(base) if isinstance(base, dict) else {}
    for name, value in top.items():
        result[name] = lay_over(result.get(name), value, f"{path}.{name}" if path else str(name), problems)
    return result


def _lay_over_list(base: Any, top: dict[Any, Any], path: str, problems: list[str]) -> Any:
    if base is not None and not isinstance(base, list):
        return base
    result = list(base or [])
    for index in sorted(top):
        if index > len(result):
            last = f"0 to {len(result)}" if result else "0"
            problems.append(f"command line: --{path}.{index}: there are {len(result)} items; use {last}")
        elif index == len(result):
            result.append(lay_over(None, top[index], f"{path}.{index}", problems))
        else:
            result[index] = lay_over(result[index], top[index], f"{path}.{index}", problems)
    return result
