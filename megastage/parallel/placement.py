"""Where a rank's shard of a parameter lies in the whole parameter, and seeded values for just that part."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Shard, _StridedShard

from megastage.model.config import ModelConfig
from megastage.model.init import init_plan, init_rows


def local_window(tensor: Tensor) -> tuple[slice, ...]:
    """The slices of the global tensor that this rank holds (they may be empty); all of a plain tensor.

    Every layout here keeps one contiguous window per rank: tensor parallelism cuts first, FSDP cuts rows within it,
    both into equal pieces but for the last ones. Torch's own account (`compute_local_shape_and_global_offset`) cuts in
    the other order, and is off where rows divide unevenly over three or more FSDP ranks.
    """
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, length) for length in tensor.shape)
    window = [(0, length) for length in tensor.shape]
    for mesh_dim in sorted(range(tensor.device_mesh.ndim), key=lambda i: _cuts_late(tensor.placements[i])):
        dim = _cut_dim(tensor.placements[mesh_dim])
        if dim is not None:
            start, stop = window[dim]
            piece = -(-(stop - start) // tensor.device_mesh.size(mesh_dim))
            first = min(start + piece * tensor.device_mesh.get_local_rank(mesh_dim), stop)
            window[dim] = (first, min(first + piece, stop))
    found = tuple(slice(start, stop) for start, stop in window)
    local, size = tensor.to_local(), torch.Size([cut.stop - cut.start for cut in found])
    assert local.shape == size or local.numel() == size.numel() == 0, (tensor.placements, local.shape, found)
    return found


def whole_tensor(tensor: DTensor) -> Tensor:
    """The global tensor, on every rank that holds a part of it (collective)."""
    whole = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if tensor.to_local().numel():
        whole[local_window(tensor)] = tensor.to_local()
    for mesh_dim, placement in enumerate(tensor.placements):
        if _cut_dim(placement) is not None and tensor.device_mesh.size(mesh_dim) > 1:
            dist.all_reduce(whole, group=tensor.device_mesh.get_group(mesh_dim))
    return whole


def _cut_dim(placement: Placement) -> int | None:
    return placement.dim if isinstance(placement, Shard | _StridedShard) else None


def _cuts_late(placement: Placement) -> bool:
    """A strided shard cuts what the other dimensions of the mesh have left."""
    return isinstance(placement, _StridedShard)


@torch.no_grad()
def initialise(module: nn.Module, cfg: ModelConfig, seed: int) -> None:
    """Fill the parameters of a materialised part with the values that `seed` gives them on every layout."""
    for name, parameter in module.named_parameters():
        kind, std = init_plan(cfg, name)
        window = local_window(parameter)
        local: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if local.numel() == 0:
            continue
        rows = init_rows(name, tuple(parameter.shape), (kind, std), seed, window[0].start, window[0].stop)
        mine = (slice(None), *window[1:])
        local.copy_(rows[mine])
