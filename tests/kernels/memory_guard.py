"""A sanitizer for Triton's interpreter: every address a kernel touches must lie within a tensor it was given.

It also keeps the interpreter from copying whole storages, so that views into terabytes of never touched memory can be
passed: 32-bit index arithmetic then shows as an address outside.
"""

from __future__ import annotations

import mmap
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

MAP_NORESERVE = 0x4000


class OutOfBounds(AssertionError):
    pass


def byte_range(x: Tensor) -> tuple[int, int]:
    """First byte of the view and the one behind its last element."""
    if x.numel() == 0:
        return x.data_ptr(), x.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def virtual(count: int, dtype: torch.dtype) -> Tensor:
    """A flat tensor of `count` zeros that takes memory only where it is written."""
    size = count * torch.empty(0, dtype=dtype).element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)


class Guard:
    def __init__(self) -> None:
        self.allowed: list[tuple[int, int]] = []
        self.launches = 0
        self.launched: set[str] = set()

    def allow(self, *tensors: Tensor) -> None:
        """Tensors that a kernel reaches through addresses in a table."""
        self.allowed += [byte_range(x) for x in tensors]

    def check(self, pointers: np.ndarray, mask: np.ndarray | None, ranges: list[tuple[int, int]], size: int) -> None:
        active = pointers if mask is None else pointers[np.broadcast_to(mask, pointers.shape).astype(bool)]
        active = np.atleast_1d(active).astype(np.int64).reshape(-1)
        inside = np.zeros(active.shape, bool)
        for low, high in ranges:
            inside |= (active >= low) & (active + size <= high)
        if not inside.all():
            near = [(low - int(active[~inside][0]), high - int(active[~inside][0])) for low, high in ranges]
            raise OutOfBounds(f"{(~inside).sum()} of {inside.size} addresses outside; ranges relative to one: {near}")


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif hasattr(value, "base") and isinstance(value.base, Tensor):
            found.append(value.base)
        elif isinstance(value, tuple):
            found += _tensors(value)
    return found


@contextmanager
def memory_guard():
    """Within it, an interpreted kernel that touches foreign memory raises (Triton wraps OutOfBounds)."""
    from triton.runtime import interpreter

    from megastage.kernels import multi_tensor

    guard, builder, executor = Guard(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    ranges: list[tuple[int, int]] = []
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    update, build = builder.create_atomic_rmw, multi_tensor.build

    def guarded_launch(self, *args, **kwargs):
        ranges[:] = [byte_range(x) for x in _tensors([*args, *kwargs.values()])] + guard.allowed
        guard.launches += 1
        guard.launched.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    def guarded_load(self, pointers, mask, *rest, **named):
        guard.check(pointers.data, mask.data, ranges, pointers.get_element_ty().primitive_bitwidth // 8)
        return load(self, pointers, mask, *rest, **named)

    def guarded_store(self, pointers, value, mask, *rest, **named):
        guard.check(pointers.data, mask.data, ranges, pointers.get_element_ty().primitive_bitwidth // 8)
        return store(self, pointers, value, mask, *rest, **named)

    def guarded_update(self, operation, pointers, value, mask, *rest):
        guard.check(pointers.data, mask.data, ranges, pointers.get_element_ty().primitive_bitwidth // 8)
        return update(self, operation, pointers, value, mask, *rest)

    def guarded_build(lists, block):
        guard.allow(*(x for tensors in lists for x in tensors))
        return build(lists, block)

    with (
        mock.patch.object(executor, "__call__", guarded_launch),
        mock.patch.object(executor, "_init_args_hst", lambda self, args, kwargs: (list(args), dict(kwargs))),
        mock.patch.object(executor, "_restore_args_dev", return_value=None),
        mock.patch.object(builder, "create_masked_load", guarded_load),
        mock.patch.object(builder, "create_masked_store", guarded_store),
        mock.patch.object(builder, "create_atomic_rmw", guarded_update),
        mock.patch.object(multi_tensor, "build", guarded_build),
    ):
        yield guard


@contextmanager
def bf16_rounded():
    """Within it the interpreter rounds fp32 to bf16 to the nearest, as GPUs do; by itself it cuts digits off."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if (str(source), str(target), mode) != ("fp32", "bf16", None):
            return convert(data, source, target, mode)
        near = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).bfloat16()
        return near.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    with mock.patch.object(interpreter, "_convert_float", rounded):
        yield


@contextmanager
def only_program(x: int, y: int = 0):
    """A launch of grid (1,) runs the program with these numbers, as if all the others had run too."""
    from triton.runtime import interpreter

    place = interpreter.InterpreterBuilder.set_grid_idx
    with mock.patch.object(
        interpreter.InterpreterBuilder, "set_grid_idx", lambda self, *_: place(self, x, y, 0)
    ), mock.patch.object(interpreter.InterpreterBuilder, "set_grid_dim", lambda self, *_: setattr(
        self, "grid_dim", (x + 1, y + 1, 1)
    )):  # fmt: skip
        yield
