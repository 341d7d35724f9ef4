"""The editor schema is current, accepts what the loader accepts and refuses what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema
import pytest

from megastage.config.aliases import ALIASES
from megastage.config.fields import all_keys
from megastage.config.schema_json import SCHEMA_FILE, schema

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = sorted(SCHEMA_FILE.parent.glob("*.toml"))


def test_the_file_is_current() -> None:
    found = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(schema())), "run python -m megastage.config.schema_json"


def test_it_is_a_schema_without_null() -> None:
    jsonschema.Draft7Validator.check_schema(schema())
    assert '"null"' not in json.dumps(schema())


def test_every_key_is_described() -> None:
    full = schema()
    for path in [*all_keys(), *ALIASES]:
        node = full
        for part in path.split("."):
            if part == "N":
                node = node["items"]
            else:
                node = node["properties"][part]
            if "$ref" in node:
                node = {**full["definitions"][node["$ref"].rpartition("/")[2]], "described": node.get("description")}
        assert node.get("description"), path


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_files_are_valid(file: Path) -> None:
    assert file.read_text().startswith("#:schema ./megastage.schema.json\n")
    jsonschema.validate(tomllib.loads(file.read_text()), schema(), jsonschema.Draft7Validator)


@pytest.mark.parametrize(
    "tables",
    [
        {"training": {"seqlen": 3}},
        {"training": {"seq_len": "3"}},
        {"training": {"seq_len": 0}},
        {"training": {"data_stages": [{"name": "a"}]}},
        {"training": {"dataset_type": "parquet"}},
        {"nothing": {}},
    ],
)
def test_wrong_tables_are_refused(tables: dict) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tables, schema(), jsonschema.Draft7Validator)


def test_older_names_are_accepted() -> None:
    jsonschema.validate({"checkpoint": {"enable_checkpoint": True}, "training": {"seed": 3}}, schema())
