"""`--help`: every key with its type, default and one line."""

from __future__ import annotations

from megastage.config.aliases import ALIASES
from megastage.config.errors import show
from megastage.config.fields import KeyInfo, all_keys, type_name
from megastage.config.schema import Config

_HEAD = """\
usage: torchrun pretrain.py --config FILE.toml [--section.key value ...]

Every key may be set in the TOML file or on the command line, which wins. Flags: --checkpoint.enable,
--checkpoint.no-enable. Lists: one value with commas or as JSON, several values, or the option several times.
Stages by number, from 0: --training.data_stages.1.seq_len 1024.
"""


def help_text() -> str:
    """All keys by table: name, type, default, explanation, older name."""
    older = {name: alias for alias, name in ALIASES.items()}
    lines = [_HEAD]
    table = ""
    for path, info in all_keys().items():
        if path.split(".")[0] != table:
            table = path.split(".")[0]
            lines.append(f"\n[{table}] {Config.model_fields[table].description}")
        also = f" (also --{older[path]})" if path in older else ""
        lines.append(f"  --{path}  {type_name(info.annotation)}, {_default(info)}\n        {info.doc}{also}")
    return "\n".join(lines) + "\n"


def _default(info: KeyInfo) -> str:
    if info.required:
        return "required"
    return "default unset" if info.default is None else f"default {show(info.default)}"
