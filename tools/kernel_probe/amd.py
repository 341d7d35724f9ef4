"""Figures of a kernel compiled for AMD GPUs, from its assembly text."""

from __future__ import annotations

import re
from typing import Any

from kernel_probe.machines import AMD_LDS_PER_GROUP
from kernel_probe.report import Report

WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "ubyte": 1}


def figure(assembly: str, key: str) -> int:
    match = re.search(rf"\.{key}:\s+(\d+)", assembly)
    return int(match[1]) if match else 0


def loops(assembly: str) -> list[dict[str, Any]]:
    """Instruction counts of every loop (a backward branch) that holds matrix instructions."""
    lines = [line.strip() for line in assembly.splitlines()]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"^\.LBB\d+_\d+:", line)}
    found = []
    for i, line in enumerate(lines):
        match = re.match(r"s_c?branch\w*\s+(\.LBB\d+_\d+)", line)
        if not match or labels.get(match[1], i) >= i:
            continue
        counts = count([x for x in lines[labels[match[1]] : i + 1] if x and not x.startswith((".", ";"))])
        if counts["mma"]:
            found.append(counts)
    return found


def count(body: list[str]) -> dict[str, Any]:
    def n(*prefixes: str) -> int:
        return sum(line.startswith(prefixes) for line in body)

    return {
        "total": len(body), "mma": n("v_mfma"), "flop": 0, "special": n("v_exp"), "alu": n("v_") - n("v_mfma"),
        "shared": n("ds_"), "load": n("buffer_load", "global_load"), "local": n("scratch_"), "barrier": n("s_barrier"),
        "waits": n("s_waitcnt"),
    }  # fmt: skip


def widest_load(assembly: str) -> int:
    """Bytes a lane of the widest global load."""
    widths = re.findall(r"(?:buffer|global)_load_(dwordx4|dwordx3|dwordx2|dword|ushort|ubyte)\b", assembly)
    return max((WIDTHS[width] for width in widths), default=0)


def analyse(kernel: Any, name: str, arch: str, warps: int, stages: int) -> Report:
    assembly = kernel.asm["amdgcn"]
    registers, shared = figure(assembly, "vgpr_count"), int(kernel.metadata.shared)
    body = [line.strip() for line in assembly.splitlines()]
    totals = count([line for line in body if line and not line.startswith((".", ";")) and not line.endswith(":")])
    spills = figure(assembly, "vgpr_spill_count") + totals["local"]
    # 512 vector registers a lane and SIMD, four SIMDs a compute unit
    waves = min(8, 512 // max(registers, 1)) * 4
    groups = min(waves // warps, AMD_LDS_PER_GROUP[arch] // shared if shared else waves)
    return Report(
        name, arch, warps, stages, registers, spills, figure(assembly, "private_segment_fixed_size"), shared,
        groups, groups * warps, "registers" if waves // warps == groups else "shared memory", totals,
        loops(assembly), widest_load=widest_load(assembly),
    )  # fmt: skip
