"""Rotary position embedding (Su et al. 2021), half-split layout: pairs are (i, i + D/2)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_reference(x_BTHD: Tensor, cos_PF: Tensor, sin_PF: Tensor, positions_BT: Tensor) -> Tensor:
    """Rotate x [B, T, H, D] by the angles of `positions_BT`; tables are [positions, D/2] in fp32."""
    cos = cos_PF[positions_BT][:, :, None, :]
    sin = sin_PF[positions_BT][:, :, None, :]
    low, high = x_BTHD.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x_BTHD.dtype)


def rope_qk(
    q_BTHD: Tensor, k_BTKD: Tensor, cos_PF: Tensor, sin_PF: Tensor, positions_BT: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys together. Positions are int64 [B, T] and restart wherever a document does."""
    return (
        rope_reference(q_BTHD, cos_PF, sin_PF, positions_BT),
        rope_reference(k_BTKD, cos_PF, sin_PF, positions_BT),
    )
