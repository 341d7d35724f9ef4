"""Euclidean norm over all gradients in one pass over memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from megastage.kernels.dispatch import one_device, use_triton


def sum_of_squares(tensors: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Sum of the squares of all elements, an fp32 scalar (fp64 if a tensor is): what ranks add up before the root.

    The tensors (local shards) share a device; dtypes may differ. No tensors give 0 on the CPU. Infinities and NaN
    show in the result. Raises ValueError for tensors on several devices. The kernel reads a copy of those that are not
    contiguous.
    """
    tensors = [x.detach() for x in tensors if x.numel()]
    if not tensors:
        return torch.zeros(())
    one_device("sum_of_squares", tensors)
    kernel: list[Tensor] = []
    plain: list[Tensor] = []
    for x in tensors:
        (kernel if use_triton(backend, x.device, "optimizer", x.dtype) else plain).append(x)
    parts = [sum_of_squares_op([x.contiguous() for x in kernel])] if kernel else []
    if plain:
        parts.append(sum_of_squares_reference(plain))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def global_norm(tensors: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Square root of `sum_of_squares`: the norm of this rank's tensors."""
    return sum_of_squares(tensors, backend=backend).sqrt()


def sum_of_squares_reference(tensors: Sequence[Tensor]) -> Tensor:
    """In fp32 within a tensor (fp64 for fp64), in fp64 over tensors."""
    wide = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    norms = [torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return torch.stack([norm.double().square() for norm in norms]).sum().to(wide)


@torch.library.custom_op("megastage::sum_of_squares", mutates_args=())
def sum_of_squares_op(tensors: Sequence[Tensor]) -> Tensor:
    """fp32 scalar for non-empty contiguous tensors on one device."""
    from megastage.kernels import global_norm_triton, multi_tensor

    multi_tensor.check_lists(tensors)
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for x in tensors:
        by_dtype[x.dtype].append(x)
    partial = torch.cat([global_norm_triton.partial_sums(same) for same in by_dtype.values()])
    return partial.sum(dtype=torch.float64).float()


@sum_of_squares_op.register_fake
def _(tensors):
    return tensors[0].new_empty((), dtype=torch.float32)
