"""Tile shapes and launch options of the attention kernels, as data: tuning/flash_attention.json.

Keyed by architecture, element width in bits (bf16 and fp16 make the same code), padded head dimension and kernel. An
entry may hold changes for a Triton minor version under "triton" (the compilers differ in what they spill), and for head
dimensions below the tile's width ("padded") and softcap, which need more registers. What `tools/tune_kernels.py`
measured on a GPU stands beside it in attention_*.json, in the form of table.py, and is laid over it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from megastage.kernels.launch import TRITON_MINOR
from megastage.kernels.tuning import table

TABLE = Path(__file__).parent / "tuning" / "flash_attention.json"
KERNELS = ("forward", "dq", "dkv", "dk", "dv")
MAX_HEAD_DIM = 256


class Tiles(NamedTuple):
    """block_m queries by block_n keys; cut: length of blocks that need a mask; tma: full blocks come by descriptor."""

    block_m: int
    block_n: int
    cut: int
    num_warps: int
    num_stages: int
    tma: bool = False
    options: tuple[tuple[str, int], ...] = ()


@functools.cache
def shipped_table() -> dict:
    return json.loads(TABLE.read_text())


def lookup(
    kernel: str, arch: str, dtype: torch.dtype, block_d: int, softcap: bool = False, padded: bool = False
) -> Tiles:
    """Settings of one kernel: what is being tried, what was measured for exactly this, or the shipped entry."""
    op = f"attention_{kernel}"
    config = table.FORCED.get(op)
    if config is None:
        plain = not softcap and not padded
        config = table.exact(op, arch, TRITON_MINOR, dtype, block_d) if plain else {}
    shipped = _shipped(kernel, arch, _bits(dtype), block_d, softcap, padded)
    if not config:
        return shipped
    changed = {**shipped._asdict(), **config}
    return Tiles(**{**changed, "tma": bool(changed["tma"])})


def key_kernels(arch: str, dtype: torch.dtype, block_d: int) -> tuple[str, ...]:
    """What gives dk and dv: one kernel, "dkv", or two, "dk" and "dv", as the table's entry for the size says."""
    return ("dkv",) if "dkv" in _shipped_entries(arch, _bits(dtype), block_d) else ("dk", "dv")


def _bits(dtype: torch.dtype) -> int:
    return 32 if dtype == torch.float32 else 16


def _shipped_entries(arch: str, bits: int, block_d: int) -> dict[str, dict]:
    """By kernel; smaller head dimensions than the table's smallest use that one."""
    heads = shipped_table()[arch][str(bits)]
    return heads[str(min(int(d) for d in heads if int(d) >= block_d))]


@functools.cache
def _shipped(kernel: str, arch: str, bits: int, block_d: int, softcap: bool, padded: bool) -> Tiles:
    entry = dict(_shipped_entries(arch, bits, block_d)[kernel])
    changes = {key: entry.pop(key, {}) for key in ("triton", "padded", "softcap")}
    entry.update(changes["triton"].get(TRITON_MINOR, {}))
    if padded:
        entry.update(changes["padded"])
    if softcap:
        entry.update(changes["softcap"])
    options = tuple(sorted(entry.pop("options", {}).items()))
    return Tiles(**{**entry, "tma": bool(entry.get("tma", False))}, options=options)


def precision(arch: str, fp32: bool) -> str:
    """How products of fp32 tiles are formed: three tf32 products keep fp32's accuracy on NVIDIA's tensor cores.

    The interpreter's are NumPy's, which round one and the same product differently in tiles of other shapes, so that
    backward would not find forward's scores again; tensor cores do not. Summed in fp64 they are alike.
    """
    if not fp32:
        return "tf32"
    return "fp64" if arch == "interpreter" else "ieee" if arch.startswith("gfx") else "tf32x3"


@functools.cache
def architecture(device_type: str, index: int | None) -> str:
    """Name in the table of a device: the newest NVIDIA generation not newer than it, or gfx942 for AMD."""
    if device_type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    capability = torch.cuda.get_device_capability(index)
    if capability in ((8, 6), (8, 9)) or capability[0] >= 12:
        return "sm_86"  # the chips with about 100 KiB of shared memory
    if capability[0] >= 10:
        return "sm_100"
    return "sm_90" if capability[0] == 9 else "sm_80"
