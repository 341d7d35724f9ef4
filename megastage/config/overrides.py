"""`--section.key value` on the command line, laid over the tables of the file."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megastage.config.errors import show
from megastage.config.fields import KeyInfo, find, item_type, nearest, parse_text, type_name


@dataclass(frozen=True)
class Arguments:
    """The command line taken apart: values by dotted key path as written, and what was wrong with it."""

    config_file: str | None
    values: dict[str, Any]
    problems: list[str]
    wants_help: bool


def read_arguments(argv: Sequence[str]) -> Arguments:
    """Take `argv` (without the program's name) apart: `--key value`, `--key=value`, `--flag`, `--table.no-flag`.

    A list may be one comma-separated or JSON value, several values, or several options, which add up. Of a single
    value given twice the last counts.
    """
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
            problems.append(f"command line: --{name} is not a known key{_meant(path)}")
            continue
        texts = [text] if has_value else _take_values(info, queue)
        if not texts:
            problems.append(f"command line: --{name} needs a value ({type_name(info.annotation)})")
            continue
        _set(values, path, name, info, texts, negated, problems)
    config_file = values.pop("job.config_file", None)
    return Arguments(config_file, values, problems, wants_help)


def _take_values(info: KeyInfo, queue: list[str]) -> list[str]:
    """The values that follow a key's name, taken off the queue: one, all of a list, none needed for a flag."""
    taken: list[str] = []
    while queue and not queue[0].startswith("--") and queue[0] != "-h":
        taken.append(queue.pop(0))
        if item_type(info.annotation) is None:
            break
    return taken or (["true"] if info.annotation is bool else [])


def _set(
    values: dict[str, Any], path: str, name: str, info: KeyInfo, texts: list[str], negated: bool, problems: list[str]
) -> None:
    """Enter what `texts` stand for into `values`."""
    for text in texts:
        try:
            value = parse_text(info.annotation, text)
        except ValueError as error:
            hint = "; leave the key out for its default" if text in ("None", "null") else ""
            problems.append(f"command line: --{name} {show(text)}: {error}{hint}")
            continue
        if path == "job.config_file" and values.get(path, value) != value:
            problems.append(f"command line: --config is given twice, {show(values[path])} and {show(value)}; keep one")
        if isinstance(value, list):
            value = [*values.get(path, []), *value]
        values[path] = (not value) if negated else value


def _key_path(name: str) -> tuple[str, bool]:
    """Dotted path of an option's name, and whether it is a negated flag (`checkpoint.no-enable`)."""
    if name == "config":
        return "job.config_file", False
    path = re.sub(r"\[(\d+)\]", r".\1", name).replace("-", "_")
    table, _, leaf = path.rpartition(".")
    if find(path) is None and leaf.startswith("no_"):
        positive = f"{table}.{leaf[3:]}"
        info = find(positive)
        if info is not None and info.annotation is bool:
            return positive, True
    return path, False


def _meant(path: str) -> str:
    """What to say of a name that is no key's."""
    if re.match(r"training\.data_stages\.\D", path):
        return "; stages are counted from 0, as in --training.data_stages.0.seq_len"
    close = nearest(path)
    return f"; did you mean --{close}?" if close else ""


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
