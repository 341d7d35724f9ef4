"""The device mesh: pipeline x data x tensor, ranks laid out with tensor parallelism innermost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megastage.config.layout import Layout


@dataclass(frozen=True)
class Mesh:
    """Groups of one run. Dimensions of `root`: pp, rep (replicas, HSDP), shard (FSDP; context parallel inside), tp."""

    layout: Layout
    root: DeviceMesh

    @property
    def tp(self) -> DeviceMesh:
        return self.root["tp"]

    @property
    def pp(self) -> DeviceMesh:
        return self.root["pp"]

    @property
    def fsdp(self) -> DeviceMesh:
        """1-D (shard) for FSDP, 2-D (rep, shard) for HSDP."""
        return self.root["rep", "shard"] if self.layout.dp_replicate > 1 else self.root["shard"]

    @cached_property
    def data(self) -> DeviceMesh:
        """All ranks that see different rows (or different parts of rows): rep x shard in one dimension."""
        return self.root["rep", "shard"]._flatten("data")

    @property
    def tp_rank(self) -> int:
        return self.tp.get_local_rank()

    @property
    def pp_rank(self) -> int:
        return self.pp.get_local_rank()

    @property
    def data_rank(self) -> int:
        return self.data.get_local_rank()

    def group(self, name: str) -> dist.ProcessGroup:
        """The process group of a dimension of `root`, or of "data"."""
        return self.data.get_group() if name == "data" else self.root.get_group(name)


def build_mesh(layout: Layout, device_type: str) -> Mesh:
    """Make the mesh of a run; every rank calls it once, in the same order."""
    shape = (layout.pp, layout.dp_replicate, layout.dp_shard * layout.cp, layout.tp)
    mesh = Mesh(layout, init_device_mesh(device_type, shape, mesh_dim_names=("pp", "rep", "shard", "tp")))
    assert mesh.data.size() == layout.dpcp
    return mesh
