"""The training loss of each source: sums over its rows of the global batch, that travel with the loss itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megastage.data.batch import Batch
from megastage.data.sources.base import IGNORED


def source_sums(batch: Batch, row_losses: Sequence[Tensor], n_sources: int, *, count_labels: bool) -> Tensor:
    """float64 [2, n_sources]: this rank's summed losses and its valid labels by source, on the batch's device.

    row_losses: of the batch's rows in order, in parts, or nothing on a rank without the head. count_labels: whether
    this rank is the one of those that share its labels that counts them.
    """
    sums = torch.zeros(2, n_sources, dtype=torch.float64, device=batch.source_B.device)
    if row_losses:
        sums[0].index_add_(0, batch.source_B, torch.cat(list(row_losses)).double())
    if count_labels:
        sums[1].index_add_(0, batch.source_B, (batch.labels_BT != IGNORED).sum(1).double())
    return sums


def by_source(names: Sequence[str], sums: Sequence[float]) -> dict[str, float]:
    """Mean loss over valid labels of each source that has some. sums: `source_sums` of all ranks, flat."""
    losses, labels = sums[: len(names)], sums[len(names) :]
    return {name: loss / count for name, loss, count in zip(names, losses, labels, strict=True) if count}
