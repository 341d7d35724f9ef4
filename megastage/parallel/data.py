"""Data parallelism: FSDP2 over the data ranks (and replicas of it, HSDP), applied to a tensor-parallel part."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from megastage.loss import ModelPart

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shard(
    part: ModelPart, mesh: DeviceMesh, *, param_dtype: str, reduce_dtype: str, reshard_after_forward: bool
) -> None:
    """Shard every parameter over `mesh`: one unit per layer, one for embedding, norm and head together.

    param_dtype: compute and all-gather; reduce_dtype: gradient reduce-scatter. Master weights keep their own dtype.
    Gradients are averaged over the data ranks, so losses are scaled by their number beforehand.
    """
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[param_dtype], reduce_dtype=DTYPES[reduce_dtype])
    for layer in part.decoder.layers.values():
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if mesh.device_type == "cpu":
        assert isinstance(part, FSDPModule)
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
