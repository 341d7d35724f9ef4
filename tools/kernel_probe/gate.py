"""Compile every kernel that the package ships for every architecture it names, and judge the machine code."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_probe.bars import missed
from kernel_probe.compiler import probe
from kernel_probe.report import Report

if TYPE_CHECKING:
    from megastage.kernels.registry import KernelSpec

NARROW_BYTES = 8  # a kernel without tensor loops must load at least this much a lane somewhere


@dataclass
class Verdict:
    """problems: empty if the kernel passes. cached: the figures come from an earlier run of the same source."""

    kernel: str
    case: str
    arch: str
    report: Report | None
    problems: list[str]
    cached: bool = False

    @property
    def name(self) -> str:
        return f"{self.kernel} [{self.case}] {self.arch}"

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "report": self.report.as_dict() if self.report else None}


def source_key(spec: KernelSpec) -> str:
    """Hash over all that decides the machine code (the kernel and every function it calls, types, settings, compiler)
    and over the code that reads it."""
    import triton

    reader = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    parts = (
        triton.__version__, spec.fn.cache_key, sorted(spec.signature.items()), sorted(map(str, spec.constants.items())),
        spec.arch, spec.num_warps, spec.num_stages, sorted(map(str, spec.options.items())), reader,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def judge(report: Report, tensor: bool, scalar: bool = False, exact: bool = False) -> list[str]:
    """What is wrong with a kernel; `tensor`, `scalar` and `exact` as in KernelSpec."""
    problems = []
    if report.ctas_per_sm < 1:
        problems.append(f"does not fit on a multiprocessor ({report.limiter}: {report.shared} B shared)")
    if exact:
        return problems
    if not tensor:
        if report.spills:
            problems.append(f"{report.spills} spill instructions")
        if report.widest_load < NARROW_BYTES and not scalar:
            problems.append(f"loads at most {report.widest_load} B a lane at once")
        return problems
    if not any(loop["mma"] for loop in report.loops):
        problems.append("no tensor loop found")
    if spilled := sum(loop["local"] for loop in report.loops):
        problems.append(f"{spilled} spill instructions in tensor loops")
    if report.serialised:
        problems.append(f"{report.serialised} loops with serialised wgmma")
    if report.unpipelined:
        problems.append(f"{report.unpipelined} loops fed by plain loads")
    return problems


def cause(error: BaseException) -> str:
    """The first of a chain of errors: Triton wraps it once per function on the way up."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error)[-300:]}"


def check(spec: KernelSpec, cache: Path | None) -> Verdict:
    """Compile (or take the cached figures of the same source) and judge."""
    name = (spec.kernel, spec.case, spec.arch)
    file = cache / f"{source_key(spec)}.json" if cache else None
    cached = file is not None and file.exists()
    if file is not None and cached:
        # two cases may need one compiled form
        report = replace(Report.from_dict(json.loads(file.read_text())), name=f"{spec.kernel} [{spec.case}]")
    else:
        try:
            report = probe(
                spec.fn, spec.signature, spec.constants, arch=spec.arch, num_warps=spec.num_warps,
                num_stages=spec.num_stages, name=f"{spec.kernel} [{spec.case}]", options=spec.options,
            )  # fmt: skip
        except Exception as error:  # whatever the compiler throws is the verdict on this kernel, not the end of the run
            return Verdict(*name, None, [f"does not compile: {cause(error)}"])
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{multiprocessing.current_process().pid}.part")
            part.write_text(json.dumps(report.as_dict()))
            part.replace(file)
    problems = judge(report, spec.tensor, spec.scalar, spec.exact) + missed(spec, report)
    return Verdict(*name, report, problems, cached)


_SPECS: Sequence[KernelSpec] = ()
_CACHE: Path | None = None


def _check_index(index: int) -> Verdict:
    return check(_SPECS[index], _CACHE)


def run(specs: Sequence[KernelSpec], cache: Path | None, jobs: int) -> list[Verdict]:
    """Verdicts in the order of the specs. Kernels cannot be pickled, so workers are forked and told a number."""
    global _SPECS, _CACHE
    _SPECS, _CACHE = specs, cache
    if jobs <= 1:
        return [check(spec, cache) for spec in specs]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        return pool.map(_check_index, range(len(specs)), chunksize=1)
