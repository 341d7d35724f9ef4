"""Output projection and cross-entropy in one, chunked over tokens so that the logits of a batch never exist at once.

Vocabulary-parallel (Shoeybi et al. 2019, section 3): each rank of `group` holds rows [vocab_start, vocab_start + V) of
the weight; row maxima, sums of exponentials and target logits are reduced over the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

IGNORE = -100


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, op, group=group)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of token losses; gradients are formed with the logits of each chunk, so backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, vocab_start: int, z_loss: float,
        chunk: int, group: dist.ProcessGroup | None,
    ) -> Tensor:  # fmt: skip
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=wide, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=wide)
        for start in range(0, hidden_ND.shape[0], chunk):
            h_CD, labels_C = hidden_ND[start : start + chunk], labels_N[start : start + chunk]
            loss, grad_CV = _chunk(h_CD, weight_VD, labels_C, vocab_start, z_loss, group, wide)
            total += loss
            grad_CV = grad_CV.to(h_CD.dtype)
            grad_hidden[start : start + chunk] = grad_CV @ weight_VD
            grad_weight += (grad_CV.mT @ h_CD).to(wide)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_outputs[0]
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight * scale.to(grad_weight.dtype), *([None] * 5)


def _chunk(
    h_CD: Tensor, weight_VD: Tensor, labels_C: Tensor, vocab_start: int, z_loss: float,
    group: dist.ProcessGroup | None, wide: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Summed loss of a chunk (equal on all ranks of the group) and its gradient by the local logits [C, V]."""
    logits_CV = (h_CD @ weight_VD.mT).to(wide)
    peak_C = logits_CV.max(-1).values
    _all_reduce(peak_C, dist.ReduceOp.MAX, group)
    exp_CV = (logits_CV - peak_C[:, None]).exp_()
    sum_C = exp_CV.sum(-1)
    valid_C = labels_C != IGNORE
    local_C = labels_C - vocab_start
    mine_C = valid_C & (local_C >= 0) & (local_C < weight_VD.shape[0])
    column_C = torch.where(mine_C, local_C, 0)
    target_C = torch.where(mine_C, logits_CV.gather(1, column_C[:, None])[:, 0], 0)
    both = torch.stack((sum_C, target_C))
    _all_reduce(both, dist.ReduceOp.SUM, group)
    lse_C = both[0].log() + peak_C
    loss = torch.where(valid_C, lse_C - both[1] + z_loss * lse_C.square(), 0).sum()
    grad_CV = exp_CV.mul_((valid_C * (1 + 2 * z_loss * lse_C) / both[0])[:, None])
    grad_CV.scatter_add_(1, column_C[:, None], -mine_C.to(wide)[:, None])
    return loss, grad_CV


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    vocab_start: int = 0,
    z_loss: float = 0.0,
    chunk_tokens: int = 1024,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum over valid tokens of cross-entropy (+ z_loss * lse^2, Chowdhery et al. 2022), a scalar in fp32.

    labels_N: int64, -100 is ignored; they are global vocabulary ids. The gradient of `hidden_ND` is this rank's part:
    with a group of several ranks it must still be summed over the group by the caller.
    """
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, vocab_start, z_loss, chunk_tokens, group)
