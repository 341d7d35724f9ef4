"""The attention kernels for the offline gate, in the registry's form; they are listed in _attention_specs."""

from __future__ import annotations

from typing import Any

from megastage.kernels.registry import KernelSpec

FAST_HEAD_DIMS = (64, 128)
FORMS = ((False, False), (True, False), (False, True))  # softcap, sink
MAIN = ("attention_forward", "attention_dq", "attention_dkv")


def gate_specs(arch: str) -> list[KernelSpec]:
    """Every head dimension plain; softcap and sink at 128. Masks are data: one kernel serves them all."""
    from megastage.kernels import _attention_specs

    found: dict[str, KernelSpec] = {}
    for softcap, sink in FORMS:
        dims = (128,) if softcap or sink else _attention_specs.HEAD_DIMS
        for listed in _attention_specs.specs((arch,), dims, softcap=softcap, sink=sink):
            spec = _spec(arch, dict(listed), fast=not (softcap or sink))
            found.setdefault(spec.name, spec)
    return list(found.values())


def _spec(arch: str, listed: dict[str, Any], fast: bool) -> KernelSpec:
    kernel, _, case = listed.pop("name").partition(f" {arch}")
    head_dim = listed["constexprs"].get("D")
    del listed["sm"]
    return KernelSpec(
        kernel, case.strip(), arch, listed.pop("fn"), listed.pop("signature"), listed.pop("constexprs"),
        listed.pop("num_warps"), listed.pop("num_stages"), tensor=kernel in MAIN, scalar=head_dim is None,
        fast=fast and head_dim in (None, *FAST_HEAD_DIMS), options=listed.pop("options", {}) | listed,
    )  # fmt: skip
