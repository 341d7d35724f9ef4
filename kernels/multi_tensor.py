"""One launch over a list of tensors: addresses in one small table, and which program works on which part in another.

The second depends on the sizes only and is kept; the first is rebuilt a call, because gradients move."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from megastage.kernels.dispatch import one_device

_KEPT: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
_KEPT_MOST = 32


@dataclass(frozen=True)
class Table:
    """addresses [n, lists] int64; parts [programs, 3] int64: tensor, first element, number of elements.
    aligned: every address is a multiple of 16 bytes."""

    addresses: Tensor
    parts: Tensor
    aligned: bool


def check_lists(*lists: Sequence[Tensor]) -> None:
    """ValueError unless all lists hold dense tensors of the same sizes on one device."""
    sizes = [[x.numel() for x in tensors] for tensors in lists]
    if any(size != sizes[0] for size in sizes):
        raise ValueError("the lists of tensors must match in length and in the number of elements of each tensor")
    one_device("lists of tensors", (x for tensors in lists for x in tensors))
    for tensors in lists:
        for x in tensors:
            if not x.is_contiguous():
                raise ValueError(f"a tensor of shape {tuple(x.shape)} is not contiguous: pass flat shards")


def build(lists: Sequence[Sequence[Tensor]], block: int) -> Table:
    """The tables for lists of non-empty tensors that passed `check_lists`, in parts of `block` elements."""
    device = lists[0][0].device
    rows = [[x.data_ptr() for x in tensors] for tensors in zip(*lists)]
    aligned = all(address % 16 == 0 for row in rows for address in row)
    # from pinned memory, which PyTorch keeps until the copy is done: a plain copy would wait for all that the GPU has
    # yet to do, the whole backward pass, before the kernel could even be launched
    addresses = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return Table(addresses, _parts(lists[0], block, device), aligned)


def _parts(tensors: Sequence[Tensor], block: int, device: torch.device) -> Tensor:
    sizes = tuple(x.numel() for x in tensors)
    key = (sizes, block, device)
    if key not in _KEPT:
        counts = torch.tensor([triton.cdiv(size, block) for size in sizes])
        tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        first = (torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]) * block
        left = (torch.tensor(sizes)[tensor] - first).clamp(max=block)
        _KEPT[key] = torch.stack((tensor, first, left), 1).to(device)
        while len(_KEPT) > _KEPT_MOST:
            _KEPT.popitem(last=False)
    _KEPT.move_to_end(key)
    return _KEPT[key]
