"""Floating-point operations of a training step, and what devices can do (NumPy only).

A multiply-add counts 2. Model FLOPs (for MFU) are those that the mathematics needs: forward, and twice that backward;
attention counts the (query, key) pairs that causality and document boundaries leave. Hardware FLOPs (for HFU) add what
is computed again: recomputed layers, and the scores that tiled attention forms anew in its backward pass
(Chowdhery et al. 2022, appendix B; Korthikanti et al. 2022, appendix A). Norms, RoPE and activations are left out.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from megastage.model.config import ModelConfig
from megastage.model.parameters import layer_shapes


def attended_pairs(cu_seqlens: Any) -> int:
    """(query, key) pairs of causal attention within documents: the sum of n (n + 1) / 2 over document lengths n.

    cu_seqlens: integers [..., C], per row 0 and the ascending document ends, the last repeated as padding (an array, a
    CPU tensor or nested lists).
    """
    ends = np.asarray(cu_seqlens, dtype=np.int64)
    length = ends[..., 1:] - ends[..., :-1]
    return int((length * (length + 1) // 2).sum())


def causal_pairs(seq_len: int) -> int:
    """Pairs of one row that is a single document."""
    return seq_len * (seq_len + 1) // 2


def _layer_matrix_elements(cfg: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in layer_shapes(cfg).values() if len(shape) == 2)


def _dense(cfg: ModelConfig, tokens: int) -> int:
    """Forward FLOPs of all layers' matrices."""
    return 2 * tokens * cfg.n_layers * _layer_matrix_elements(cfg)


def _attention(cfg: ModelConfig, pairs: int) -> int:
    """Forward FLOPs of all layers' scores and weighted sums."""
    return 4 * pairs * cfg.n_layers * cfg.n_heads * cfg.head_dim


def forward_flops(cfg: ModelConfig, tokens: int, pairs: int) -> int:
    """Layers, attention and output projection (tied or not) for `tokens` positions and `pairs` attended pairs."""
    return _dense(cfg, tokens) + _attention(cfg, pairs) + 2 * tokens * cfg.vocab_size * cfg.dim


def model_flops(cfg: ModelConfig, tokens: int, pairs: int) -> int:
    """FLOPs of forward and backward, nothing computed twice: the numerator of MFU."""
    return 3 * forward_flops(cfg, tokens, pairs)


def hardware_flops(cfg: ModelConfig, tokens: int, pairs: int, *, recomputed: float = 0.0) -> int:
    """Model FLOPs plus repeated work: the numerator of HFU.

    recomputed: share of the layers whose forward pass runs again in the backward pass, 0 .. 1. A layer's last product
    (w2) is never formed again, since nothing in the backward pass needs its value.
    """
    last_products = 2 * tokens * cfg.n_layers * cfg.dim * cfg.ffn_dim
    again = recomputed * (_dense(cfg, tokens) - last_products + _attention(cfg, pairs))
    return model_flops(cfg, tokens, pairs) + round(again) + _attention(cfg, pairs) // 2


# Dense (not sparse) bf16 tensor peak, FLOP/s, from the makers' data sheets; the first pattern found in the name counts.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"GB300|B300", 2.5e15),
    (r"GB200", 2.5e15),
    (r"B200", 2.25e15),
    (r"B100", 1.75e15),
    (r"H200 NVL", 835.5e12),
    (r"H200|GH200", 989.4e12),
    (r"H100 NVL", 835.5e12),
    (r"H100 PCIe", 756e12),
    (r"H100|H800", 989.4e12),
    (r"H20", 148e12),
    (r"A100|A800", 312e12),
    (r"A30", 165e12),
    (r"A40", 149.7e12),
    (r"A10G", 70e12),
    (r"A10", 125e12),
    (r"RTX A6000", 154.8e12),
    (r"L40S", 362.05e12),
    (r"L40", 181.05e12),
    (r"L4", 121e12),
    (r"RTX 6000 Ada", 364.25e12),
    (r"RTX 4090", 165.2e12),
    (r"RTX 3090", 71e12),
    (r"MI355X", 2.5e15),
    (r"MI350X", 2.3e15),
    (r"MI325X|MI300X", 1307.4e12),
    (r"MI300A", 980.6e12),
    (r"MI250X", 191.5e12),  # a device is one of the two dies
    (r"MI250", 181.05e12),
)


def peak_flops(device_name: str) -> float | None:
    """bf16 peak of one device in FLOP/s by the name that the driver gives it, None when unknown (any CPU)."""
    for pattern, peak in _PEAKS:
        if re.search(rf"\b({pattern})\b", device_name, re.IGNORECASE):
            return peak
    return None


def utilisation(flops: float, seconds: float, devices: int, device_peak: float | None) -> float | None:
    """Share of the peak of `devices` devices that `flops` in `seconds` make up; None where the peak is unknown."""
    return None if device_peak is None else flops / (seconds * devices * device_peak)
