"""RMSNorm (Zhang & Sennrich 2019), optionally fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension; statistics in fp32 (fp64 for fp64 input)."""
    acc = x if x.dtype == torch.float64 else x.float()
    normed = acc * torch.rsqrt(acc.square().mean(-1, keepdim=True) + eps)
    return (normed * weight_D.to(acc.dtype)).to(x.dtype)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float = 1e-5, *, backend: str = "auto") -> Tensor:
    """RMSNorm over the last dimension; x [..., D] and the result share shape and dtype."""
    return rms_norm_reference(x, weight_D, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass over memory."""
    total = x + residual
    return rms_norm_reference(total, weight_D, eps), total
