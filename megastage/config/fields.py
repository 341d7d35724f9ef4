"""The schema seen as a flat list of keys: for help, unknown-key hints and values given as text."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megastage.config.aliases import ALIASES
from megastage.config.keys import Section
from megastage.config.schema import Config


@dataclass(frozen=True)
class KeyInfo:
    """One key: dotted `path` (items of a list of tables as `N`), bare type, default, one line of explanation."""

    path: str
    annotation: Any
    default: Any
    required: bool
    doc: str


def bare(annotation: Any) -> Any:
    """`annotation` without Annotated and without None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return bare(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return bare(members[0])
    return annotation


def item_type(annotation: Any) -> Any | None:
    """Type of a list's items, or None where `annotation` is no list."""
    return bare(get_args(annotation)[0]) if get_origin(annotation) is tuple else None


def is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def type_name(annotation: Any) -> str:
    """The type as help and messages name it."""
    item = item_type(annotation)
    if item is not None:
        return f"list of {type_name(item)}"
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if is_table(annotation) or get_origin(annotation) is dict:
        return "table"
    return {bool: "bool", int: "int", float: "float", str: "string"}[annotation]


def _walk(section: type[Section], prefix: str) -> Iterator[KeyInfo]:
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        annotation = bare(field.annotation)
        if is_table(annotation) and field.default is not None:
            yield from _walk(annotation, f"{path}.")
            continue
        yield _info(path, annotation, field)
        item = item_type(annotation)
        if is_table(annotation):
            yield from _walk(annotation, f"{path}.")
        elif item is not None and is_table(item):
            yield from _walk(item, f"{path}.N.")


def _info(path: str, annotation: Any, field: FieldInfo) -> KeyInfo:
    default = None if field.is_required() else field.default
    return KeyInfo(path, annotation, default, field.is_required(), field.description or "")


@cache
def all_keys() -> dict[str, KeyInfo]:
    """Every key by its path, in the schema's order."""
    return {info.path: info for info in _walk(Config, "")}


def find(path: str) -> KeyInfo | None:
    """The key at `path`, by canonical name or alias; numbers stand for items of a list."""
    generic = ".".join("N" if part.isdigit() else part for part in path.split("."))
    return all_keys().get(ALIASES.get(generic, generic))


def nearest(path: str) -> str | None:
    """The known key that `path` most likely means: the same name in another table, else the closest spelling."""
    known = [*all_keys(), *ALIASES]
    table, _, leaf = path.rpartition(".")
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf and ".N." not in name]
    if same_leaf:
        return max(same_leaf, key=lambda name: difflib.SequenceMatcher(None, name, path).ratio())
    in_table = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == table}
    close = difflib.get_close_matches(leaf, in_table, n=1, cutoff=0.6)
    if close:
        return in_table[close[0]]
    for name in difflib.get_close_matches(path, known, n=5, cutoff=0.6):  # a table and a key misspelt
        if difflib.SequenceMatcher(None, name.rpartition(".")[2], leaf).ratio() >= 0.6:
            return name
    return None


def parse_text(annotation: Any, text: str) -> Any:
    """The value that `text` from the command line stands for. Raises ValueError saying what it must be."""
    item = item_type(annotation)
    if item is not None:
        return _parse_list(item, text)
    if is_table(annotation) or get_origin(annotation) is dict:
        return _parse_json(text, dict, "a table as JSON")
    if annotation is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("must be true or false")
        return text.lower() == "true"
    if annotation in (int, float):
        try:
            return int(text.replace("_", "")) if annotation is int else float(text)
        except ValueError:
            raise ValueError("must be an integer" if annotation is int else "must be a number") from None
    return text


def _parse_list(item: Any, text: str) -> list[Any]:
    if text.lstrip().startswith("[") or is_table(item) or item_type(item) is not None:
        return _parse_json(text, list, "a list as JSON")
    return [parse_text(item, part.strip()) for part in text.split(",") if part.strip()]


def _parse_json(text: str, kind: type, what: str) -> Any:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be {what} ({error})") from None
    if not isinstance(value, kind):
        raise ValueError(f"must be {what}")
    return value
