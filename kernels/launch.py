"""What every Triton launch needs: settings for the tensor's device, and helpers over block sizes."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from megastage.kernels.dispatch import architecture
from megastage.kernels.tuning import table

TRITON_MINOR = ".".join(triton.__version__.split(".")[:2])


@cache
def device_architecture(device: torch.device) -> str:
    return architecture(device)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least; one on the CPU, where the interpreter runs them in turn."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def settings(op: str, arch: str, dtype: torch.dtype, dim: int, default: dict[str, int]) -> dict[str, int]:
    """The kernel's default overlaid with the tuning table's entry for this architecture, dtype and size."""
    return default | (table.FORCED.get(op) or table.lookup(op, arch, TRITON_MINOR, dtype, dim))


def settings_for(op: str, x: Tensor, dim: int, default: dict[str, int]) -> dict[str, int]:
    return settings(op, device_architecture(x.device), x.dtype, dim, default)


def rows_of(x: Tensor) -> Tensor:
    """x as [rows, D] with unit stride in D: a view where the strides allow it."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def warps_for(elements: int, per_thread: int = 16) -> int:
    """Warps so that a tile leaves about `per_thread` elements to each thread; a power of two from 1 to 16."""
    return max(1, min(16, triton.next_power_of_2(triton.cdiv(elements, 32 * per_thread))))
