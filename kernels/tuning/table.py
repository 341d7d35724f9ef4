"""Launch settings of the kernels as data: one JSON file an op, each a list of entries

    {"arch": "sm_90", "triton": "3.7", "dtype": "bf16", "dim": 128, "config": {"rows": 4, "num_warps": 8}}

`tools/tune_kernels.py` measures and writes them. `dim` is the size that the op is tuned by (head dim, model width ...);
an entry counts for sizes up to the next listed one. Without a fitting entry the kernel's own default holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
FORCED: dict[str, dict[str, int]] = {}
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@cache
def entries(op: str) -> tuple[dict[str, Any], ...]:
    """All entries of `op`; empty without a file. ValueError names the file and the entry that is malformed."""
    path = FOLDER / f"{op}.json"
    if not path.exists():
        return ()
    found = json.loads(path.read_text())
    for entry in found:
        if set(entry) != {"arch", "triton", "dtype", "dim", "config"} or not all(
            isinstance(value, int) for value in entry["config"].values()
        ):
            raise ValueError(f"{path}: {entry} must have arch, triton, dtype, dim and an integer-valued config")
    return tuple(found)


@cache
def lookup(op: str, arch: str, triton_minor: str, dtype: torch.dtype, dim: int) -> dict[str, int]:
    """Settings for this architecture: the nearest `dim` not above the asked one, the same Triton minor version first,
    then any other version; empty if the architecture or the dtype has none (the kernel's default then holds)."""
    fits = [
        entry
        for entry in entries(op)
        if entry["arch"] == arch and entry["dtype"] == DTYPE_NAMES.get(dtype) and entry["dim"] <= dim
    ]
    if not fits:
        return {}
    best = max(fits, key=lambda entry: (entry["triton"] == triton_minor, entry["dim"]))
    return dict(best["config"])


@cache
def exact(op: str, arch: str, triton_minor: str, dtype: torch.dtype, dim: int) -> dict[str, int]:
    """Settings measured for exactly this; empty without. For kernels whose code differs by compiler and size."""
    asked = (arch, triton_minor, DTYPE_NAMES.get(dtype), dim)
    for entry in entries(op):
        if (entry["arch"], entry["triton"], entry["dtype"], entry["dim"]) == asked:
            return dict(entry["config"])
    return {}


@contextmanager
def forced(op: str, config: dict[str, int]) -> Iterator[None]:
    """Within it, launches of `op` take this configuration: for the tuner, which must try it before it is written."""
    FORCED[op] = config
    try:
        yield
    finally:
        del FORCED[op]


def dims(op: str, arch: str, *usual: int) -> list[int]:
    """The sizes at which `op` must compile on `arch`: the usual ones and every one that the table names."""
    return sorted({*usual, *(entry["dim"] for entry in entries(op) if entry["arch"] == arch)})
