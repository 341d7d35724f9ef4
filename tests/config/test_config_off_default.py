"""No key is silently ignored: off its default each is taken as it is and read by the program, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import megastage
from megastage.config.fields import KeyInfo, all_keys, type_name
from megastage.config.load import ConfigError, load_config
from megastage.config.unbuilt import UNBUILT_CHOICES, UNBUILT_KEYS

PACKAGE = Path(megastage.__file__).parent
# files that name keys without making use of them
LISTS = {"run_tables.py", "train_tables.py", "unbuilt_tables.py", "unbuilt.py", "aliases.py", "keys.py"}
# accepted for the sake of existing files, and of no consequence, as --help says
INERT = {"job.use_for_integration_test", "training.dataloader.persistent_workers"}
PATHS = [path for path in all_keys() if ".N." not in path and path not in ("job.config_file", "training.data_stages")]


def other_value(info: KeyInfo) -> str:
    """Some value that is not the default, as written on the command line."""
    kind = type_name(info.annotation)
    if "|" in kind:
        return next(word for word in kind.split("|") if word != info.default)
    if kind.startswith("list of list"):
        return '[["a"]]'
    if kind in ("int", "float"):
        number = info.default or 0
        return str(number + 2 if kind == "int" else 1.5 * number + 0.25)
    if kind == "bool":
        return str(not info.default)
    return {"table": '{"a": 1}', "list of string": "x,y", "list of float": "1,2"}.get(kind, "other")


@pytest.mark.parametrize("path", PATHS)
def test_off_its_default_a_key_is_taken_or_refused(path: str) -> None:
    info = all_keys()[path]
    text = other_value(info)
    leaf = path.rpartition(".")[2]
    cfg, refusal = None, ""
    try:
        cfg = load_config([f"--{path}={text}"], 1)
    except ConfigError as error:
        refusal = str(error)
    if cfg is None:  # sizes and degrees are told by what they don't fit together with
        assert any(name in refusal for name in (leaf, "model.n_heads", "rope_scaling.kind", "[parallelism]")), refusal
    else:
        assert cfg.is_set(path)
        assert cfg.value(path) != info.default
        assert path.endswith(".filter_fqns") or path not in UNBUILT_KEYS


def test_every_key_is_read_by_the_program() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file.name not in LISTS]
    source = "\n".join(file.read_text() for file in [*files, PACKAGE.parent / "pretrain.py"])
    words = set(re.findall(r"\w+", source))
    tables = {path.partition(".")[0] for path in UNBUILT_KEYS if path.endswith(".*")}
    unread = {path for path in all_keys() if path.rpartition(".")[2] not in words}
    refused = {*UNBUILT_KEYS, *UNBUILT_CHOICES}
    assert {path for path in unread - refused if path.partition(".")[0] not in tables} <= INERT
