"""What the instructions of a loop ask of each pipe, and the ceilings that follow from counting alone.

All cycles are per warp and iteration, of one quarter of a multiprocessor:
  tensor   FLOP of the loop's matrix instructions / tensor FLOP per clock of a quarter
  issue    instructions (one per clock)
  fma, alu, special, shared   instructions of that pipe x 32 lanes / lanes per clock
  ceil_overlap = tensor / the busiest pipe, if all pipes overlapped perfectly
  ceil_serial  = tensor / (tensor + the busiest other pipe), if matrix and other work never overlapped
They know nothing of latency, caches, bank conflicts, barriers or clock throttling.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from kernel_probe.machines import Machine
from kernel_probe.sass import Instruction

KINDS = {
    "fma": {"FADD", "FMUL", "FFMA", "FFMA2", "FADD2", "FMUL2", "HFMA2", "HADD2", "HMUL2", "IMAD", "UIMAD"},
    "special": {"MUFU"},
    "convert": {"F2FP", "F2F", "F2I", "I2F", "I2FP", "F2IP"},
    "shuffle": {"SHFL", "REDUX"},
    "shared": {"LDS", "STS", "LDSM", "STSM", "ATOMS"},
    "local": {"LDL", "STL"},
    "load": {"LDG", "LD"},
    "cp_async": {"LDGSTS"},
    "tma": {"UTMALDG", "UTMASTG", "UBLKCP", "UTMAREDG", "UTMACCTL"},
    "store": {"STG", "ST"},
    "atomic": {"ATOM", "ATOMG", "RED", "REDG"},
    "barrier": {
        "BAR", "SYNCS", "WARPSYNC", "DEPBAR", "WARPGROUP", "LDGDEPBAR", "ARRIVES", "UCGABAR_ARV", "FENCE", "MEMBAR",
        "ERRBAR", "UTCBAR",
    },
    "branch": {"BRA", "BSSY", "BSYNC", "BRX", "EXIT", "CALL", "RET", "NANOSLEEP"},
    "other": {"NOP", "YIELD"},
}  # fmt: skip
KIND_OF = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes}
TENSOR = {"HMMA", "HGMMA", "QGMMA", "IMMA", "IGMMA", "QMMA", "OMMA", "BMMA", "UTCHMMA", "UTCQMMA", "UTCOMMA"}
UNIFORM = re.compile(r"^(U[A-Z]|R2UR|S2UR|VOTEU)")
MMA_SHAPES = {
    "884": (8, 8, 4), "1684": (16, 8, 4), "1688": (16, 8, 8), "16816": (16, 8, 16), "16832": (16, 8, 32),
    "16864": (16, 8, 64),
}  # fmt: skip


def kind(instruction: Instruction) -> str:
    """Class of an instruction: a key of KINDS, "mma", "uniform" or, for the rest, "alu"."""
    base = instruction.base
    if base in TENSOR:
        return "mma"
    return KIND_OF.get(base) or ("uniform" if UNIFORM.match(base) else "alu")


def mma_flop(instruction: Instruction) -> float:
    """FLOP that one warp's share of a matrix instruction makes (0 for tcgen05, whose shape is not in its name)."""
    opcode = instruction.opcode
    if match := re.match(r"^[HQI]GMMA\.(\d+)x(\d+)x(\d+)", opcode):  # issued by a group of four warps
        return 2.0 * int(match[1]) * int(match[2]) * int(match[3]) / 4
    if instruction.base in TENSOR and (match := re.search(r"\.(\d{3,6})(?:\.|$)", opcode)):
        M, N, K = MMA_SHAPES.get(match[1], (0, 0, 0))
        return 2.0 * M * N * K
    return 0.0


def access_bytes(opcode: str) -> int:
    """Bytes a lane moves with a memory instruction; 4 if the name does not say."""
    base = opcode.split(".")[0]
    if base in ("LDSM", "STSM") and (match := re.search(r"\.(\d)(?:\.|$)", opcode)):
        return 4 * int(match[1])
    match = re.search(r"\.(32|64|128|256)\b", opcode)
    if match:
        return int(match[1]) // 8
    if match := re.search(r"\.[US](8|16)\b", opcode):
        return int(match[1]) // 8
    return 4


def census(body: list[Instruction], machine: Machine, extra_flop: float = 0.0) -> dict[str, Any]:
    """Counts by kind, FLOP, cycles by pipe and ceilings of a loop body. extra_flop: of tcgen05 instructions."""
    counts: Counter[str] = Counter(dict.fromkeys([*KINDS, "mma", "uniform", "alu"], 0))
    counts.update(kind(instruction) for instruction in body)
    flop = sum(map(mma_flop, body)) + extra_flop
    # local memory shares the pipe of shared memory (both live in L1)
    shared_bytes = sum(32 * access_bytes(i.opcode) for i in body if kind(i) in ("shared", "local", "cp_async"))
    cycles = {
        "tensor": flop / (machine.tensor_flop / 4),
        "issue": float(len(body)),
        "fma": counts["fma"] * 32 / machine.fma_lanes,
        "alu": (counts["alu"] + counts["convert"]) * 32 / machine.alu_lanes,
        "special": counts["special"] * 32 / machine.special_lanes,
        "shared": shared_bytes / (machine.shared_bytes_clk / 4) + counts["shuffle"] * 32 / 8,
    }
    non_mma = len(body) - counts["mma"]
    other = max([float(non_mma)] + [v for k, v in cycles.items() if k not in ("tensor", "issue")])
    tensor = cycles["tensor"]
    return {
        **counts,
        "total": len(body),
        "flop": flop,
        "stall": sum(i.stall for i in body),
        "waits": sum(i.wait != 0 for i in body),
        "cycles": {name: round(value, 1) for name, value in cycles.items()},
        "bound_by": max(cycles, key=lambda name: cycles[name]),
        "nontensor_per_kflop": round(non_mma / flop * 1e3, 3) if flop else None,
        "ceil_overlap": round(tensor / max(cycles.values()), 3) if tensor else None,
        "ceil_serial": round(tensor / (tensor + other), 3) if tensor else None,
    }
