"""Public figures of the GPUs that kernels are judged for (vendors' programming guides and data sheets)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Rates per clock: tensor FLOP of a multiprocessor (dense bf16, fp32 sums), lanes of each pipe of one of its four
    quarters, shared-memory bytes of a multiprocessor. Sizes in bytes, registers and warps per multiprocessor."""

    name: str
    tensor_flop: int
    fma_lanes: int
    alu_lanes: int
    special_lanes: int
    shared_bytes_clk: int
    shared_per_sm: int
    shared_per_cta: int
    registers: int = 65536
    warps: int = 64
    ctas: int = 32


MACHINES = {
    80: Machine("A100", 2048, 16, 16, 4, 128, 164 * 1024, 163 * 1024),
    86: Machine("A10, A40, RTX 30", 1024, 32, 16, 4, 128, 100 * 1024, 99 * 1024, warps=48, ctas=16),
    90: Machine("H100", 4096, 32, 16, 4, 128, 228 * 1024, 227 * 1024),
    100: Machine("B200", 8192, 32, 16, 4, 128, 228 * 1024, 227 * 1024),
}
AMD_LDS_PER_GROUP = {"gfx942": 64 * 1024}


def occupancy(machine: Machine, registers: int, warps: int, shared: int) -> tuple[int, int, str]:
    """(blocks per multiprocessor, warps per multiprocessor, what limits them) for one block's needs."""
    per_warp = math.ceil(registers * 32 / 256) * 256
    limits = {
        "CTA slots": machine.ctas,
        "registers": machine.registers // (per_warp * warps) if registers else machine.ctas,
        "shared memory": machine.shared_per_sm // (shared + 1024) if shared else machine.ctas,
        "warps": machine.warps // warps,
    }
    if shared > machine.shared_per_cta:
        limits["shared memory"] = 0
    limiter = min(limits, key=lambda name: limits[name])
    return limits[limiter], limits[limiter] * warps, limiter
