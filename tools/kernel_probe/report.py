"""The figures of one compiled kernel, as text, as a table row and as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

HEAD = [
    "kernel", "target", "warps/stages", "regs", "spill instr", "shared", "CTA/warps per SM", "loads", "MMA", "instr",
    "non-MMA per kflop", "bound by", "ceil overlap", "ceil serial",
]  # fmt: skip


@dataclass
class Report:
    """target: "sm_90" or "gfx942". registers a thread (vector registers on AMD); spills: instructions that touch local
    memory; shared: bytes a block; serialised: tensor loops whose asynchronous products the assembler put in a row;
    unpipelined: tensor loops fed by plain loads; widest_load: bytes a lane of the widest global load; loops: a census
    of each innermost tensor loop; totals: instructions of the whole kernel by kind."""

    name: str
    target: str
    warps: int
    stages: int
    registers: int
    spills: int
    local_bytes: int
    shared: int
    ctas_per_sm: int
    warps_per_sm: int
    limiter: str
    totals: dict[str, int]
    loops: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    compile_s: float = 0.0
    serialised: int = 0
    unpipelined: int = 0
    widest_load: int = 0

    @property
    def main(self) -> dict[str, Any] | None:
        """The tensor loop with the most FLOP an iteration; of equals, the one with fewest instructions (unmasked)."""
        return max(self.loops, key=lambda loop: (loop["flop"] or loop["mma"], -loop["total"]), default=None)

    @property
    def loads(self) -> str:
        """How the main loop, or a kernel without one, reads global memory."""
        tensor_loop = self.main if self.main and self.main["mma"] else None
        counts = tensor_loop or self.totals
        for key, name in (("tma", "TMA"), ("cp_async", "cp.async"), ("load", "plain")):
            if counts.get(key):
                return name if key != "load" or tensor_loop else f"{8 * self.widest_load}-bit"
        return "none"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "loads": self.loads}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        return cls(**{key: value for key, value in data.items() if key != "loads"})

    def row(self) -> list[Any]:
        main = self.main or {}
        products = str(main.get("mma", "")) + (f"/{main['wgmma_groups']}g" if main.get("wgmma_groups") else "")
        return [
            self.name, self.target, f"{self.warps}w/{self.stages}s", self.registers, self.spills,
            f"{self.shared / 1024:.0f}K", f"{self.ctas_per_sm}/{self.warps_per_sm}", self.loads, products,
            main.get("total", self.totals.get("total")), main.get("nontensor_per_kflop"), main.get("bound_by"),
            main.get("ceil_overlap"), main.get("ceil_serial"),
        ]  # fmt: skip

    def text(self) -> str:
        lines = [
            f"== {self.name}  {self.target} warps={self.warps} stages={self.stages}  compile {self.compile_s:.1f}s",
            f"   registers/thread {self.registers}  spill instructions {self.spills} ({self.local_bytes} B)  shared "
            f"{self.shared} B -> {self.ctas_per_sm} CTA/SM = {self.warps_per_sm} warps (limited by {self.limiter})",
            f"   whole kernel: {_counts(self.totals)}",
        ]
        for loop in self.loops:
            lines.append(f"   loop{' (main)' if loop is self.main else ''}: {_counts(loop)}")
        return "\n".join(lines + [f"   note: {note}" for note in self.notes])


def _counts(counts: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in counts.items() if value not in (0, 0.0, None))


def table(reports: list[Report]) -> str:
    """A Markdown table, one row a report."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for report in reports:
        lines.append("| " + " | ".join("" if v is None else str(v) for v in report.row()) + " |")
    return "\n".join(lines)
