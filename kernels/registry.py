"""What the package launches, as calls whose compiled kernels are all to be built and judged without a GPU.

A kernel module `X_triton.py` (for attention `flash_attention_cases.py`) offers `gate_cases(arch) -> list[GateCase]`.
The gate makes each call on small CPU tensors, notes every launch with the types, alignments and settings that Triton
derives from its arguments, and compiles exactly that: what is judged is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
MAIN_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")  # sm_86 runs sm_80's code with smaller tiles
MODULES = (
    "flash_attention_cases",
    "rms_norm_triton",
    "rope_triton",
    "swiglu_triton",
    "cross_entropy_triton",
    "optimizer_triton",
    "global_norm_triton",
)


@dataclass(frozen=True)
class GateCase:
    """`call` launches kernels on CPU tensors of its own, as `name` says ("bf16 D128").

    fast: part of the quick selection. form: another form of a listed case (other heads, layouts, dtypes), which
    docs/kernels-gate.md leaves out. exact: an fp32 form, for checks and small models: it must compile and fit on the
    chip, but is not held to the speed rules, which are those of 16-bit tensor cores.
    """

    name: str
    call: Callable[[], object]
    fast: bool = True
    form: bool = False
    exact: bool = False


@dataclass(frozen=True)
class KernelSpec:
    """One compiled form of a kernel.

    signature: argument name to "<type>[:promises]" ("*bf16:16", "i32", "i64:16", "*bf16:16,range32"; 16 promises
    divisibility by 16, range32 a tensor below 2 GiB, 1 the constant 1; "None" is an absent argument). constants: the
    tl.constexpr arguments. tensor: the main loop works on tensor cores, so pipelining is judged. scalar: works on small
    index arrays, so the width of its loads is not judged. fast, exact: as in GateCase.
    """

    kernel: str
    case: str
    arch: str
    fn: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1
    tensor: bool = False
    scalar: bool = False
    fast: bool = True
    exact: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.kernel} [{self.case}] {self.arch}"


def all_cases(
    architectures: Iterable[str] = ARCHITECTURES, *, fast: bool = False, forms: bool = True
) -> list[tuple[str, GateCase]]:
    """(architecture, case) of every kernel module; imports Triton. fast: only the quick selection. forms: other forms
    of the listed cases too."""
    modules = [import_module(f"megastage.kernels.{name}") for name in MODULES]
    return [
        (arch, case)
        for module in modules
        for arch in architectures
        for case in module.gate_cases(arch)
        if (case.fast or not fast) and (forms or not case.form)
    ]
