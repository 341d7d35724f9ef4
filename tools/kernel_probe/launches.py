"""Which compiled kernels a call needs on a GPU that is not there.

The call runs on CPU tensors with Triton told that the chip is another. Triton's own launcher then derives types,
alignments, constants and options from the arguments and asks for the compiled kernel; that request is noted and
answered with nothing, so that no kernel runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from kernel_probe.compiler import gpu_target

from megastage.kernels.registry import GateCase, KernelSpec

TENSOR_KERNELS = ("attention_forward", "attention_dq", "attention_dkv", "attention_dk", "attention_dv")
INDEX_KERNELS = ("intervals",)


class AbsentDriver:
    """Triton's driver of a chip of which only the name is known."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # Triton keeps one cache of kernels a device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def pretending(arch: str) -> Iterator[list[dict[str, Any]]]:
    """Launches of CPU tensors go through the list that this gives, compiled for `arch`; none is made."""
    from triton import knobs
    from triton.runtime import driver

    from megastage.kernels import _attention_tuning, launch

    requests: list[dict[str, Any]] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        requests.append({"fn": fn.jit_function, **compile})
        return True  # "do not compile": the launcher then returns

    with (
        mock.patch.object(launch, "device_architecture", return_value=arch),
        mock.patch.object(_attention_tuning, "architecture", return_value=arch),
        mock.patch.object(knobs.runtime, "jit_cache_hook", note),
        mock.patch.object(driver, "_active", AbsentDriver(gpu_target(arch))),
    ):
        yield requests


def spec_of(request: dict[str, Any], arch: str, case: GateCase) -> KernelSpec:
    """The compile request of one launch in the registry's form."""
    fn, types, promises = request["fn"], request["signature"], request["configs"][0]
    signature, constants = {}, {}
    for i, (name, kind) in enumerate(types.items()):
        if kind == "constexpr":
            constants[name] = request["constants"][(i,)]
        else:
            promised = [f"{'range' * (key == 'tt.pointer_range')}{value}" for key, value in promises.get((i,), [])]
            signature[name] = f"{kind}:{','.join(promised)}" if promised else kind
    kernel = fn.fn.__name__.removesuffix("_kernel")
    if "WITH_DK" in constants and not (constants["WITH_DK"] and constants["WITH_DV"]):
        kernel = "attention_dk" if constants["WITH_DK"] else "attention_dv"
    settings = json.loads(request["specialization_data"])["options"]
    default = _default_options(arch)
    options = {
        key: value
        for key, value in settings.items()
        if isinstance(value, int | str) and value != default.get(key) and key not in ("num_warps", "num_stages")
    }
    return KernelSpec(
        kernel, case.name, arch, fn, signature, constants, request["num_warps"], request["num_stages"],
        tensor=kernel in TENSOR_KERNELS, scalar=kernel in INDEX_KERNELS, fast=case.fast, exact=case.exact,
        options=options,
    )  # fmt: skip


def _default_options(arch: str) -> dict[str, Any]:
    from triton.compiler import make_backend

    return vars(make_backend(gpu_target(arch)).parse_options({"enable_fp_fusion": True}))


def specs_of(cases: Iterable[tuple[str, GateCase]]) -> list[KernelSpec]:
    """Every different compiled form behind the cases, under the name of the first case that needs it."""
    from kernel_probe.gate import source_key

    found: dict[tuple[str, str], KernelSpec] = {}
    for arch, case in cases:
        with pretending(arch) as requests:
            case.call()
        assert requests, f"case {case.name} launches nothing"
        for request in requests:
            spec = spec_of(request, arch, case)
            found.setdefault((arch, source_key(spec)), spec)
    return list(found.values())
