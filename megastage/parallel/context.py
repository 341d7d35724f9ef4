"""Context parallelism: several ranks share each row (all-gathered keys and values, as in Llama 3, section 3.3.2).

A row of S positions is cut into 2n chunks; rank r of n holds chunks r and 2n-1-r, so that causal work is even. Keys and
values are gathered over the group, put in order, and each of the rank's two query slices attends with its row offset.
Exact for any document boundaries, since those stay in row coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megastage.data.batch import Batch
from megastage.model.ops import Ops
from megastage.parallel.collectives import gather_sequence
from megastage.parallel.mesh import Mesh


@dataclass(frozen=True)
class ContextGroup:
    """The ranks that share this rank's rows in stages of one degree; degree 1 has no group."""

    degree: int
    rank: int
    group: dist.ProcessGroup | None

    def slices(self, seq_len: int) -> list[slice]:
        """Where this rank's positions lie in a row: one slice, or two chunks of a shared row."""
        if self.degree == 1:
            return [slice(0, seq_len)]
        chunk = seq_len // (2 * self.degree)
        return [slice(i * chunk, (i + 1) * chunk) for i in (self.rank, 2 * self.degree - 1 - self.rank)]

    def shard(self, batch: Batch) -> Batch:
        """This rank's positions of each row; document boundaries stay those of the whole row."""
        if self.degree == 1:
            return batch
        cuts = self.slices(batch.tokens_BT.shape[1])

        def cut(x_BT: Tensor) -> Tensor:
            return torch.cat([x_BT[:, s] for s in cuts], 1)

        return replace(
            batch,
            tokens_BT=cut(batch.tokens_BT),
            labels_BT=cut(batch.labels_BT),
            shard_positions_BT=cut(batch.positions_BT),
        )

    def ops(self, ops: Ops) -> Ops:
        """`ops` with attention over the group's whole rows."""
        return ops if self.degree == 1 else replace(ops, attention=_SharedRows(self, ops.attention))


class _SharedRows:
    """Attention of this rank's queries over keys and values gathered from the whole group."""

    def __init__(self, context: ContextGroup, attention: Callable[..., Tensor]) -> None:
        self.context, self.attention = context, attention

    def __call__(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, cu_seqlens_BC: Tensor | None) -> Tensor:
        assert self.context.group is not None
        both = torch.cat((k_BTKD, v_BTKD), dim=-1)
        gathered = _in_order(gather_sequence(both, self.context.group), self.context.degree)
        k_BSKD, v_BSKD = gathered.split((k_BTKD.shape[-1], v_BTKD.shape[-1]), dim=-1)
        parts = []
        for q, where in zip(q_BTHD.chunk(2, dim=1), self.context.slices(k_BSKD.shape[1])):
            parts.append(self.attention(q, k_BSKD, v_BSKD, cu_seqlens_BC, q_offset=where.start))
        return torch.cat(parts, dim=1)


def _in_order(x_BSKD: Tensor, degree: int) -> Tensor:
    """From rank order (chunks 0, 2n-1, 1, 2n-2, ...) to row order."""
    chunks = x_BSKD.chunk(2 * degree, dim=1)
    order: list[Any] = [None] * (2 * degree)
    for rank in range(degree):
        order[rank], order[2 * degree - 1 - rank] = chunks[2 * rank], chunks[2 * rank + 1]
    return torch.cat(order, dim=1)


def make_groups(mesh: Mesh, degrees: Iterable[int]) -> dict[int, ContextGroup]:
    """A group for every degree that a stage of the run uses: neighbours within the shard dimension.

    Collective: every rank calls it at start-up with the same degrees, so that a boundary makes no group.
    """
    made = {1: ContextGroup(1, 0, None)}
    ranks = mesh.root.mesh.movedim(2, -1).flatten(0, -2)  # [others, shard]
    for degree in sorted(set(degrees) - {1}):
        for row in ranks.unfold(1, degree, degree).flatten(0, 1).tolist():
            group = dist.new_group(row)
            if dist.get_rank() in row:
                made[degree] = ContextGroup(degree, row.index(dist.get_rank()), group)
    return made
