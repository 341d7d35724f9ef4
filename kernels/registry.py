"""Every compiled form of every kernel that the package ships, so that all can be compiled and judged without a GPU.

A kernel module `X_triton.py` (for attention `flash_attention_specs.py`) offers `gate_specs(arch) -> list[KernelSpec]`:
what it would launch on that architecture in bf16, taken from the same tuning tables as the launch itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
MODULES = (
    "flash_attention_specs",
    "rms_norm_triton",
    "rope_triton",
    "swiglu_triton",
    "cross_entropy_triton",
    "optimizer_triton",
    "global_norm_triton",
)


@dataclass(frozen=True)
class KernelSpec:
    """One compiled form of a kernel.

    signature: argument name to ahead-of-time type, "<type>[:16]" ("*bf16:16", "i32", "i64:16"; ":16" promises
    divisibility by 16, ":1" the constant 1, "None" an absent argument). constants: the tl.constexpr arguments.
    tensor: the main loop works on tensor cores, so pipelining is judged. scalar: works on small index arrays, so the
    width of its loads is not judged. fast: part of the quick selection.
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
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.kernel} [{self.case}] {self.arch}"


def all_specs(architectures: Iterable[str] = ARCHITECTURES, *, fast: bool = False) -> list[KernelSpec]:
    """The specs of every kernel module; imports Triton. fast: only the quick selection."""
    specs = []
    for module_name in MODULES:
        path = f"megastage.kernels.{module_name}"
        module = import_module(path)
        for arch in architectures:
            specs += [spec for spec in module.gate_specs(arch) if spec.fast or not fast]
    names = [spec.name for spec in specs]
    assert len(set(names)) == len(names), "two kernel specs have one name"
    return specs
