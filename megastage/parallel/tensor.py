"""Tensor parallelism with sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022) from one table of names.

The decoder is plain PyTorch. `apply` gives each of its parameters a place on the tp mesh as a DTensor and changes the
class of the module that owns it; forward then works on local shards with explicit collectives. Between the sub-layers
the hidden state holds this rank's share of the sequence, [B, T/tp, D].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from megastage.model.config import ModelConfig
from megastage.model.decoder import Decoder
from megastage.model.layers import Embedding, Linear, RMSNorm
from megastage.parallel.collectives import gather_project, reduce_scatter_sequence


class _OnMesh(nn.Module):
    """A module whose `weight` is a DTensor on the tp mesh and whose forward computes with the local shard."""

    weight: nn.Parameter
    tp_group: dist.ProcessGroup

    def local_weight(self) -> Tensor:
        return _local(self.weight)


def _local(weight: Tensor, grad_placements: list[Placement] | None = None) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local(grad_placements=grad_placements)


class ColumnLinear(_OnMesh, Linear):
    """Rows of the weight (output features) are sharded; `_project` gives it the whole input."""


class SharedHeadLinear(_OnMesh, Linear):
    """Keys or values where ranks outnumber their heads: several ranks serve the query heads of one. Every rank holds
    all rows and projects those of its own head, so that its gradients are partial sums."""

    head: slice

    def local_weight(self) -> Tensor:
        return _local(self.weight, [Partial()])[self.head]


class RowLinear(_OnMesh, Linear):
    """Columns of the weight (input features) are sharded; partial outputs are summed and scattered over T."""

    def forward(self, x: Tensor) -> Tensor:
        return reduce_scatter_sequence(F.linear(x, self.local_weight()), self.tp_group)


class ReplicatedRMSNorm(_OnMesh, RMSNorm):
    """Every rank holds the weight but sees its share of the sequence (or heads) only: gradients are partial sums."""

    def local_weight(self) -> Tensor:
        return _local(self.weight, [Partial()])


class VocabEmbedding(_OnMesh, Embedding):
    """Rows of the table (vocabulary) are sharded; foreign ids give 0, and the sum is scattered along the sequence."""

    vocab_start: int

    def forward(self, tokens_BT: Tensor) -> Tensor:
        table_VD = self.local_weight()
        if self.tp_group.size() == 1:
            return F.embedding(tokens_BT, table_VD)
        local_BT = tokens_BT - self.vocab_start
        foreign_BT = (local_BT < 0) | (local_BT >= table_VD.shape[0])
        x_BTD = F.embedding(local_BT.masked_fill(foreign_BT, 0), table_VD).masked_fill(foreign_BT[..., None], 0)
        return reduce_scatter_sequence(x_BTD, self.tp_group)


# name of a module in the decoder -> its class under tensor parallelism and the placement of its weight on the tp mesh
STYLES: tuple[tuple[str, type[_OnMesh], Placement], ...] = (
    (r"tok_embeddings", VocabEmbedding, Shard(0)),
    (r"layers\.\d+\.attention\.w[qkv]", ColumnLinear, Shard(0)),
    (r"layers\.\d+\.attention\.wo", RowLinear, Shard(1)),
    (r"layers\.\d+\.attention\.[qk]_norm", ReplicatedRMSNorm, Replicate()),
    (r"layers\.\d+\.feed_forward\.w[13]", ColumnLinear, Shard(0)),
    (r"layers\.\d+\.feed_forward\.w2", RowLinear, Shard(1)),
    (r"layers\.\d+\.(attention|ffn)_norm", ReplicatedRMSNorm, Replicate()),
    (r"norm", ReplicatedRMSNorm, Replicate()),
    (r"output", ColumnLinear, Shard(0)),
)
KEYS_AND_VALUES = re.compile(r"layers\.\d+\.attention\.w[kv]")
# modules that see the whole sequence: they gather their input as they project it
GATHERED = re.compile(r"layers\.\d+\.(attention|feed_forward)")


def apply(decoder: Decoder, mesh: DeviceMesh) -> None:
    """Shard every parameter of `decoder` (on the meta device) over the 1-D tp mesh, by STYLES."""
    group = mesh.get_group()
    for name, module in decoder.named_modules():
        if group.size() > 1 and GATHERED.fullmatch(name):
            module.project = partial(_project, group)
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        if group.size() > decoder.cfg.n_kv_heads and KEYS_AND_VALUES.fullmatch(name):
            _convert(module, SharedHeadLinear, Replicate(), mesh)
            module.head = _shared_head(decoder.cfg, group)
            continue
        for pattern, kind, placement in STYLES:
            if re.fullmatch(pattern, name):
                _convert(module, kind, placement, mesh)
                break
        else:
            raise AssertionError(f"no tensor-parallel style for the parameters of {name}")


def _shared_head(cfg: ModelConfig, group: dist.ProcessGroup) -> slice:
    """Rows of wk and wv that make the one head which this rank's query heads attend with."""
    number = group.rank() * cfg.n_kv_heads // group.size()
    return slice(number * cfg.head_dim, (number + 1) * cfg.head_dim)


def _project(group: dist.ProcessGroup, x: Tensor, *linears: Linear) -> Sequence[Tensor]:
    return gather_project(x, [linear.local_weight() for linear in linears], group)


def _convert(module: nn.Module, kind: type[_OnMesh], placement: Placement, mesh: DeviceMesh) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, [placement])
    local = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    module.weight = nn.Parameter(
        DTensor.from_local(local, mesh, [placement], run_check=False, shape=weight.shape, stride=weight.stride())
    )
    module.__class__ = kind
    module.tp_group = mesh.get_group()  # type: ignore[assignment]
    module.vocab_start = offset[0]  # type: ignore[assignment]
