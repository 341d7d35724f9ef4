"""The three kinds of module that own parameters.

Parallel code turns an instance into its tensor-parallel kind by assigning `__class__`; the layers therefore keep
nothing but the weight and plain values, and read the weight through `local_weight()`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megastage.model.ops import Ops


class _Weighted(nn.Module):
    """A module with a single uninitialised parameter `weight`; `megastage.model.init` gives the values."""

    weight: nn.Parameter
    __call__: Callable[..., Tensor]

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))

    def local_weight(self) -> Tensor:
        """The tensor that forward computes with: all of `weight`, or this rank's shard in a tensor-parallel kind."""
        return self.weight

    def extra_repr(self) -> str:
        return "x".join(map(str, self.weight.shape))


class Linear(_Weighted):
    """y = x W^T without bias; weight [out_features, in_features]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(out_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.local_weight())


class Embedding(_Weighted):
    """Rows of weight [vocabulary, dim] looked up by int64 ids."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__(vocab_size, dim)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.local_weight())


class RMSNorm(_Weighted):
    """RMSNorm over the last dimension, statistics in fp32; weight [dim]."""

    def __init__(self, dim: int, eps: float, ops: Ops) -> None:
        super().__init__(dim)
        self.eps = eps
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.local_weight(), self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual), fused."""
        return self.ops.add_rms_norm(x, residual, self.local_weight(), self.eps)
