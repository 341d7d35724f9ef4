"""Rotary position tables: RoPE (Su et al. 2021) and its context extensions.

Angles are formed in float64 on the CPU and only the finished table is rounded to fp32: at position 131,072 an fp32
product of position and frequency is already off by 0.01 rad, and a table made on the CPU is equal on every machine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megastage.model.config import RopeScaling, RopeSpec


def inverse_frequencies(head_dim: int, spec: RopeSpec) -> Tensor:
    """Angle per position of each rotated pair, float64 [head_dim / 2], after scaling.

    Raises ValueError for an odd head_dim or an unknown kind of scaling.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim = {head_dim}: rotary embedding needs an even head dimension")
    freq_F = spec.theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    scaling = spec.scaling
    if scaling is None:
        return freq_F
    if scaling.kind == "linear":
        return freq_F / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(freq_F, scaling)
    if scaling.kind == "yarn":
        return _yarn(freq_F, scaling, head_dim, spec.theta)
    raise ValueError(f'rope scaling kind "{scaling.kind}": use "linear", "llama3" or "yarn"')


def _llama3(freq_F: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: divide slow frequencies by the factor, keep fast ones, blend linearly in turns between."""
    turns_F = scaling.original_max_positions * freq_F / (2 * math.pi)
    keep_F = (turns_F - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep_F = keep_F.clamp(0, 1)
    return freq_F * (keep_F + (1 - keep_F) / scaling.factor)


def _yarn(freq_F: Tensor, scaling: RopeScaling, head_dim: int, theta: float) -> Tensor:
    """YaRN "NTK by parts": as llama3, but the blend is linear in the pair's index between two numbers of turns."""

    def pair_of(turns: float) -> float:
        return head_dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), head_dim - 1)
    width = max(high - low, 0.001)  # a ramp of no width is a step
    divide_F = ((torch.arange(head_dim // 2, dtype=torch.float64, device="cpu") - low) / width).clamp(0, 1)
    return freq_F * (1 - divide_F + divide_F / scaling.factor)


def attention_factor(spec: RopeSpec) -> float:
    """What cos and sin are multiplied by: 1, except for YaRN's sharpening of the softmax (0.1 ln(factor) + 1)."""
    scaling = spec.scaling
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0


def rope_table(
    head_dim: int, spec: RopeSpec, max_positions: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """(cos_PF, sin_PF), fp32 [max_positions, head_dim / 2], for positions 0 .. max_positions - 1."""
    freq_F = inverse_frequencies(head_dim, spec)
    angle_PF = torch.arange(max_positions, dtype=torch.float64, device="cpu")[:, None] * freq_F
    factor = attention_factor(spec)
    return tuple((table * factor).float().to(device) for table in (angle_PF.cos(), angle_PF.sin()))  # type: ignore[return-value]
