"""JSON schema of the configuration for editors: `python -m megastage.config.schema_json` writes it to configs/.

Taplo and other TOML tools read it through the `#:schema` line on top of each shipped configuration.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megastage.config.aliases import ALIASES
from megastage.config.schema import Config

SCHEMA_FILE = Path(__file__).resolve().parents[2] / "configs" / "megastage.schema.json"


def schema() -> dict[str, Any]:
    """The schema (draft 7), with older key names as deprecated properties."""
    raw = Config.model_json_schema(ref_template="#/definitions/{model}")
    definitions = raw.pop("$defs")
    tables = {name: field.annotation.__name__ for name, field in Config.model_fields.items() if field.annotation}
    for alias, name in ALIASES.items():
        (old_table, old_key), (new_table, new_key) = alias.split("."), name.split(".")
        meant = definitions[tables[new_table]]["properties"][new_key]
        definitions[tables[old_table]]["properties"][old_key] = {
            **meant,
            "description": f"Older name of {name}: {meant['description']}",
            "deprecated": True,
        }
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "megastage configuration"}
    return _clean({**head, **raw, "title": "megastage configuration", "definitions": definitions})


def _clean(node: Any, *, names: bool = False) -> Any:
    """Without generated titles and without null, which TOML doesn't have. `names`: keys are names, not keywords."""
    if isinstance(node, list):
        return [_clean(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {}
    for name, value in node.items():
        if not names and (name, value) in (("default", None), ("additionalProperties", True)):
            continue
        if not names and name == "title" and "properties" not in node:
            continue
        result[name] = _clean(value, names=name in ("properties", "definitions") and not names)
    if names:
        return result
    options = [option for option in result.get("anyOf", []) if option != {"type": "null"}]
    if len(options) == 1:
        del result["anyOf"]
        result = {**options[0], **result}
    if len(result.get("allOf", ())) == 1:  # how pydantic before 2.9 writes a reference with a description
        result = {**result.pop("allOf")[0], **result}
    if "$ref" in result:
        result.pop("default", None)
    return result


def schema_text() -> str:
    """The schema file's text."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
    sys.stdout.write(f"wrote {SCHEMA_FILE}\n")
