"""Where a rank's shard of a parameter lies in the whole parameter, and seeded values for just that part."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megastage.model.config import ModelConfig
from megastage.model.init import init_plan, init_rows


def local_window(tensor: DTensor) -> tuple[slice, ...]:
    """The slices of the global tensor that this rank holds (they may be empty).

    Every layout here keeps one contiguous window per rank: tensor parallelism cuts first, FSDP cuts rows within it.
    """
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + length) for start, length in zip(offset, shape))


@torch.no_grad()
def initialise(module: nn.Module, cfg: ModelConfig, seed: int) -> None:
    """Fill the parameters of a materialised part with the values that `seed` gives them on every layout."""
    for name, parameter in module.named_parameters():
        kind, std = init_plan(cfg, name)
        window = local_window(parameter) if isinstance(parameter, DTensor) else tuple(map(slice, parameter.shape))
        local: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.numel() == 0:
            continue
        rows = init_rows(name, tuple(parameter.shape), (kind, std), seed, window[0].start or 0, window[0].stop)
        mine = (slice(None), *window[1:])
        local.copy_(rows[mine])
