"""Static bars of the attention kernels at head dimension 128 in bf16: what their main loops may cost.

Masks are data, so documents, windows and full attention run the same compiled kernel as the causal mask; other numbers
of heads and other lengths compile to their own code and may differ by 5 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernel_probe.report import Report

if TYPE_CHECKING:
    from megastage.kernels.registry import KernelSpec

# (kernel, architecture) to (most non-MMA instructions per kflop, least ceiling without overlap or None)
BARS: dict[tuple[str, str], tuple[float, float | None]] = {
    ("attention_forward", "sm_90"): (0.46, 0.66),
    ("attention_dkv", "sm_90"): (0.48, None),
    ("attention_dq", "sm_90"): (0.385, None),
    ("attention_forward", "sm_80"): (0.71, None),
    ("attention_dkv", "sm_80"): (0.70, None),
}
PLAIN = "bf16 D128"
FORMS = ("MHA", "MQA", "one head", "odd length", "fused", "heads first", "far apart", "sink")
VARIANTS = tuple(f"{PLAIN} {form}" for form in FORMS)
SLACK = 0.05


def missed(spec: KernelSpec, report: Report) -> list[str]:
    """The bars that a kernel misses; none for kernels without bars."""
    bar = BARS.get((spec.kernel, spec.arch))
    if bar is None or spec.case not in (PLAIN, *VARIANTS) or report.main is None:
        return []
    slack = 0.0 if spec.case == PLAIN else SLACK
    most, least = bar[0] * (1 + slack), (bar[1] or 0.0) * (1 - slack)
    cost, ceiling = report.main["nontensor_per_kflop"], report.main["ceil_serial"]
    problems = []
    if cost is None or cost > most:
        problems.append(f"{cost} non-MMA instructions per kflop, the bar is {most:.3f}")
    if ceiling is None or ceiling < least:
        problems.append(f"ceiling {ceiling}, the bar is {least:.3f}")
    if report.spills:
        problems.append(f"{report.spills} spill instructions, the bar is 0 in the whole kernel")
    return problems
