"""From the command line to a `Config`: read the file, lay overrides over it, name every problem at once."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megastage.config.absent import absent_sources
from megastage.config.aliases import canonical
from megastage.config.checks import check, static_problems
from megastage.config.errors import ConfigError, bare_key, show
from megastage.config.fields import all_keys, bare, find, is_table, item_type, nearest
from megastage.config.help import help_text
from megastage.config.keys import Section
from megastage.config.overrides import lay_over, nested, read_arguments
from megastage.config.salvage import salvage
from megastage.config.schema import Config
from megastage.config.stage_resolve import stage_problems

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["ConfigError", "load_config", "read_toml"]


def load_config(argv: Sequence[str], world_size: int | None = None, *, look_for_data: bool = False) -> Config:
    """The configuration that `argv` (without the program's name) asks for.

    `--config FILE` (or --job.config_file FILE) names the TOML file; without it everything is at its default.
    `--section.key value` overrides. `--help` prints every key and exits. Raises ConfigError with all problems at
    once; with `world_size` given, those that depend on the number of ranks too. look_for_data: beside other problems
    tell data that is missing; a run without any opens its data and sees for itself.
    """
    arguments = read_arguments(argv)
    if arguments.wants_help:
        sys.stdout.write(help_text())
        raise SystemExit(0)
    problems = list(arguments.problems)
    tables: dict[str, Any] = {}
    if arguments.config_file is not None:
        try:
            tables = read_toml(arguments.config_file)
        except ConfigError as error:
            raise ConfigError([*error.problems, *problems]) from None
    tables, written, twice = canonical(tables)
    overrides, written_over, twice_over = canonical(nested(arguments.values, problems))
    problems += twice + twice_over
    tables = lay_over(tables, overrides, "", problems)
    if arguments.config_file is not None and isinstance(tables.setdefault("job", {}), dict):
        tables["job"] = {**tables["job"], "config_file": arguments.config_file}
    tables = _known(tables, Config, "", problems)
    _refuse_none(tables, "", problems)
    cfg, whole = _validate(tables, written | written_over, world_size, problems)
    if whole and cfg is not None:
        problems += static_problems(cfg) if world_size is None else check(cfg, world_size)
        if not problems:
            return cfg
    if cfg is not None and look_for_data:
        problems += absent_sources(stage_problems(cfg, None)[0])
    raise ConfigError(problems, arguments.config_file)


def read_toml(file: str) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError naming the file, and the line where its syntax is wrong."""
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a byte-order mark
    except FileNotFoundError:
        raise ConfigError([f"{file}: there is no such file; check --config"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: can't be read as a text file ({error})"]) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{file}: {_syntax_hint(str(error), text)}"]) from None


def _syntax_hint(message: str, text: str) -> str:
    """The parser's message with the offending line and, for the usual slips, the way out."""
    found = re.search(r"at line (\d+)", message)
    if not found:
        return f"not valid TOML: {message}"
    number = int(found.group(1))
    line = text.splitlines()[number - 1].strip()
    hint = ""
    if re.search(r"=\s*(None|null|nil)\b", line):
        hint = "; TOML has no None: leave the key out to inherit or to keep the default"
    elif re.search(r"=\s*(True|False)\b", line):
        hint = "; TOML writes true and false in lower case"
    elif "overwrite a value" in message:
        hint = "; the key stands twice in its table, keep one"
    elif "twice" in message and line.startswith("["):
        hint = "; the table stands twice in the file, put its keys together"
    return f"line {number}: not valid TOML: {message}: {line!r}{hint}"


def _known(tables: dict[str, Any], section: type[Section], path: str, problems: list[str]) -> dict[str, Any]:
    """`tables` without the keys that `section` doesn't know, each of which becomes a problem."""
    result: dict[str, Any] = {}
    for name, value in tables.items():
        here = f"{path}.{bare_key(name)}" if path else bare_key(name)
        field = section.model_fields.get(name)
        if field is None:
            problems.append(_unknown(here, value, root=not path))
            continue
        annotation = bare(field.annotation)
        item = item_type(annotation)
        if is_table(annotation) and isinstance(value, dict):
            value = _known(value, annotation, here, problems)
        elif item is not None and is_table(item) and isinstance(value, list):
            value = [
                _known(entry, item, f"{here}[{index}]", problems) if isinstance(entry, dict) else entry
                for index, entry in enumerate(value)
            ]
        result[name] = value
    return result


def _unknown(path: str, value: Any, *, root: bool) -> str:
    generic = re.sub(r"\[\d+\]", ".N", path)
    if root and isinstance(value, dict):
        tables = {name.split(".")[0] for name in all_keys()}
        close = nearest_of(path, tables)
        return f"[{path}]: unknown table" + (f"; did you mean [{close}]?" if close else "")
    close = nearest(generic)
    hint = f"; did you mean {close.replace('.N', '[...]')}?" if close else "; --help lists every key"
    return f"{path} = {show(value)}: unknown key{hint}"


def nearest_of(name: str, known: set[str]) -> str | None:
    """The known name closest to `name`, if any is close."""
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return close[0] if close else None


def _refuse_none(value: Any, path: str, problems: list[str]) -> None:
    """The string "None" is never meant: TOML has no null, and an unset key is left out."""
    if isinstance(value, dict):
        for name, entry in value.items():
            _refuse_none(entry, f"{path}.{bare_key(name)}" if path else name, problems)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            _refuse_none(entry, f"{path}[{index}]", problems)
    elif isinstance(value, str) and value in ("None", "null"):
        problems.append(f'{path} = "{value}": TOML has no None; leave the key out to inherit or to keep the default')


def _validate(
    tables: dict[str, Any], written: dict[str, str], world_size: int | None, problems: list[str]
) -> tuple[Config | None, bool]:
    """The configuration, and whether it is whole. Where it isn't, the values that can't be used become problems, with
    what else is wrong, and the configuration is what is left of it."""
    try:
        return Config.model_validate(tables), True
    except ValidationError as error:
        details = error.errors()
        for detail in details:
            if detail["input"] not in ("None", "null"):
                problems.append(_explain(detail, tables, written))
        cfg, further = salvage(tables, details, world_size)
        problems += further
        return cfg, False


def _explain(detail: ErrorDetails, tables: dict[str, Any], written: dict[str, str]) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]).lstrip(".")
    path = written.get(path, path)
    if detail["type"] == "missing":
        return f"{path}: missing; every item of {path.rpartition('[')[0]} needs it"
    stage = _stage_name(detail["loc"], tables)
    return f"{path} = {show(detail['input'])}{stage}: {_requirement(detail)}"


def _stage_name(loc: tuple[int | str, ...], tables: dict[str, Any]) -> str:
    if loc[:2] != ("training", "data_stages") or len(loc) < 4:
        return ""
    entry = tables["training"]["data_stages"][loc[2]]
    return f" (stage {entry['name']!r})" if isinstance(entry.get("name"), str) else ""


def _requirement(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    limits = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("greater than", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("less than", "lt"),
    }
    if detail["type"] in limits:
        words, name = limits[detail["type"]]
        return f"must be {words} {context[name]}"
    if detail["type"] == "literal_error":
        close = nearest_of(str(detail["input"]), set(re.findall(r"'([^']*)'", context["expected"])))
        return f"must be one of {context['expected']}" + (f"; did you mean '{close}'?" if close else "")
    kinds = {
        "int_type": "must be an integer",
        "float_type": "must be a number",
        "bool_type": "must be true or false",
        "string_type": "must be a string in quotes",
        "tuple_type": _list_requirement(detail),
        "finite_number": "must be a finite number",
    }
    return kinds.get(detail["type"]) or _table_requirement(detail)


def _list_requirement(detail: ErrorDetails) -> str:
    info = find(_key(detail))
    item = None if info is None else item_type(info.annotation)
    if item is not None and is_table(item):
        return f"must be a list of tables: write each under [[{_key(detail)}]], in double brackets"
    return "must be a list in square brackets"


def _table_requirement(detail: ErrorDetails) -> str:
    if detail["type"] in ("model_type", "model_attributes_type", "dict_type"):
        info = find(_key(detail))
        is_list = info is not None and get_origin(info.annotation) is tuple
        single = f" (written as [{_key(detail)}], in single brackets)" if isinstance(detail["input"], list) else ""
        return "must be a table" + (" (written as [[...]])" if is_list else single)
    return detail["msg"]


def _key(detail: ErrorDetails) -> str:
    """Dotted path of the key that an error is about."""
    return ".".join("0" if isinstance(part, int) else part for part in detail["loc"])
