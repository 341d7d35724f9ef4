"""A tied embedding under pipeline parallelism: the first part looks ids up in it, the last projects with it.

Both parts hold a copy under one name. Their gradients are summed every step, so that equal updates keep the copies
equal; it counts once in the gradient norm and stands once in a checkpoint (the first part's).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from megastage.parallel.mesh import Mesh

TIED = "tok_embeddings.weight"


@dataclass(frozen=True)
class TiedEmbedding:
    """The group of the two ranks that hold the same shard of the table; None on ranks that hold none."""

    group: dist.ProcessGroup | None
    is_copy: bool

    @property
    def counted_elsewhere(self) -> frozenset[str]:
        """Names that this rank leaves out of norms and saved checkpoints (it loads them as the first part does)."""
        return frozenset({TIED}) if self.is_copy else frozenset()

    @torch.no_grad()
    def sum_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add up the gradients of the two copies; call after backward, before the gradient norm."""
        if self.group is None:
            return
        grad = parameters[TIED].grad
        assert isinstance(grad, DTensor)
        dist.all_reduce(grad.to_local(), group=self.group)


def find_tied(tied_embeddings: bool, mesh: Mesh) -> TiedEmbedding:
    """Make the groups of (first part, last part); every rank must call it, since making a group is collective."""
    parts = mesh.layout.pp
    if not tied_embeddings or parts == 1:
        return TiedEmbedding(None, is_copy=False)
    mine = None
    ranks = mesh.root.mesh.flatten(1)  # [pp, ranks of a part]
    for column in range(ranks.shape[1]):
        pair = [int(ranks[0, column]), int(ranks[-1, column])]
        group = dist.new_group(pair)
        if dist.get_rank() in pair:
            mine = group
    return TiedEmbedding(mine, is_copy=mesh.pp_rank == parts - 1)
