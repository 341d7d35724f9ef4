"""Which implementation of an op runs: the Triton kernel or the plain-PyTorch reference beside it.

`backend` is what the user wrote: "auto" takes Triton on a GPU where it can be imported and the reference anywhere else,
"torch" the reference always, "triton" the kernel or a clear error. Triton reads TRITON_INTERPRET when a kernel is
defined, so it must stand in the environment before the process starts; kernels are therefore imported at first use.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

BACKENDS = ("auto", "triton", "torch")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HAS_TRITON = find_spec("triton") is not None


def interpreting() -> bool:
    """True when Triton kernels run in its interpreter (on the CPU, slowly, for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def use_triton(backend: str, device: torch.device, op: str = "kernel", dtype: torch.dtype | None = None) -> bool:
    """True if `op` shall run its Triton kernel on `device`, False for the reference.

    dtype: of the operands; "auto" leaves what is not in KERNEL_DTYPES (fp64) to the reference.
    Raises ValueError for an unknown backend and for "triton" where no kernel can run.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        return device.type == "cuda" and HAS_TRITON and (dtype is None or dtype in KERNEL_DTYPES)
    if backend != "triton":
        raise ValueError(f"kernels.{op} = {backend!r} is not a backend: choose one of {', '.join(BACKENDS)}")
    if not HAS_TRITON:
        raise ValueError(f'kernels.{op} = "triton", but triton is not installed: install it or use "auto"')
    if device.type == "cpu" and not interpreting():
        raise ValueError(
            f'kernels.{op} = "triton" on the CPU runs only in Triton\'s interpreter: start the process with '
            'TRITON_INTERPRET=1 (slow, for tests), or use "auto"'
        )
    if dtype is not None and dtype not in KERNEL_DTYPES:
        raise ValueError(f'kernels.{op} = "triton" has no kernel for {dtype}: use "auto" or "torch"')
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f'kernels.{op} = "triton" has no kernel for device type {device.type!r}: use "torch"')
    return True


def resolve(backend: str, device: torch.device | str, op: str = "kernel") -> str:
    """ "triton" or "torch": what `op` runs on `device` when the user asked for `backend`."""
    return "triton" if use_triton(backend, torch.device(device), op) else "torch"


def same_device(op: str, **tensors: torch.Tensor) -> None:
    """ValueError unless all tensors lie on one device: a kernel would take the other's addresses for its own."""
    if len({x.device for x in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"{op} takes tensors of one device, not {places}")


def one_device(op: str, tensors: Iterable[torch.Tensor]) -> None:
    """As `same_device`, for lists of tensors without names."""
    places = sorted({str(x.device) for x in tensors})
    if len(places) > 1:
        raise ValueError(f"{op}: tensors on {', '.join(places)}: they must share one device")


def triton_version() -> str | None:
    """Installed Triton version, None without one. AMD's builds have another distribution name."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def architecture(device: torch.device | str) -> str:
    """Key of the tuning tables: "sm_90", "gfx942", or "cpu" for the interpreter."""
    device = torch.device(device)
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def describe(backends: Mapping[str, str], device: torch.device | str) -> list[str]:
    """Lines for the run's start: which implementation every op uses on `device`, and why.

    backends: op name to what the user asked for, for example {"rms_norm": "auto"}.
    """
    device = torch.device(device)
    used = {op: resolve(asked, device, op) for op, asked in backends.items()}
    where = architecture(device) if device.type == "cuda" else device.type
    mode = " (interpreter)" if device.type == "cpu" and interpreting() and "triton" in used.values() else ""
    lines = [f"Kernels on {where}{mode}: triton {triton_version() or 'not installed'}, torch {torch.__version__}"]
    for kind in ("triton", "torch"):
        if names := _names(op for op, is_kind in used.items() if is_kind == kind):
            lines.append(f"  {kind}: {names}")
    return lines


def _names(ops: Iterable[str]) -> str:
    return ", ".join(sorted(ops))
