"""Floating-point operations of a training step, and what devices can do (NumPy only).

A multiply-add counts 2. Model FLOPs (for MFU) are those that the mathematics needs: forward, and twice that backward;
attention counts the (query, key) pairs that causality and document boundaries leave, and padding counts nothing
(Chowdhery et al. 2022, appendix B). What is computed again in backward is no part of them. Norms, RoPE and activations
are left out.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from megastage.model.config import ModelConfig
from megastage.model.parameters import layer_shapes


def _ends(cu_seqlens: Any) -> np.ndarray:
    on_cpu = cu_seqlens.cpu() if hasattr(cu_seqlens, "cpu") else cu_seqlens
    return np.asarray(on_cpu, dtype=np.int64)


def attended_pairs(cu_seqlens: Any) -> int:
    """(query, key) pairs of causal attention within documents: the sum of n (n + 1) / 2 over document lengths n.

    cu_seqlens: integers [..., C], per row 0 and the ascending document ends, the last repeated as padding (an array, a
    tensor or nested lists).
    """
    ends = _ends(cu_seqlens)
    length = ends[..., 1:] - ends[..., :-1]
    return int((length * (length + 1) // 2).sum())


def causal_pairs(seq_len: int) -> int:
    """Pairs of one row that is a single document."""
    return seq_len * (seq_len + 1) // 2


def _layer_matrices(cfg: ModelConfig) -> dict[str, int]:
    """Elements of a layer's matrices by the last part of their module's name ("wq", ..., "w2")."""
    shapes = layer_shapes(cfg)
    return {name.split(".")[-2]: math.prod(shape) for name, shape in shapes.items() if len(shape) == 2}


def _layer_attention(cfg: ModelConfig, pairs: int) -> int:
    """Forward FLOPs of one layer's scores and weighted sums."""
    return 4 * pairs * cfg.n_heads * cfg.head_dim


def forward_flops(cfg: ModelConfig, tokens: int, pairs: int) -> int:
    """Layers, attention and output projection (tied or not) for `tokens` positions and `pairs` attended pairs."""
    layer = 2 * tokens * sum(_layer_matrices(cfg).values()) + _layer_attention(cfg, pairs)
    return cfg.n_layers * layer + 2 * tokens * cfg.vocab_size * cfg.dim


def model_flops(cfg: ModelConfig, tokens: int, pairs: int) -> int:
    """FLOPs of forward and backward, nothing computed twice: the numerator of MFU."""
    return 3 * forward_flops(cfg, tokens, pairs)


def train_flops(cfg: ModelConfig, cu_seqlens: Any) -> int:
    """Model FLOPs of a batch of packed rows; a padding tail beyond the last document does not count."""
    return model_flops(cfg, int(_ends(cu_seqlens)[..., -1].sum()), attended_pairs(cu_seqlens))


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


def peak_flops(device: Any) -> float | None:
    """bf16 peak of one device in FLOP/s, None when unknown (any CPU).

    device: the name that its driver gives, or a `torch.device`.
    """
    name = device if isinstance(device, str) else _device_name(device)
    for pattern, peak in _PEAKS:
        if re.search(rf"\b({pattern})\b", name, re.IGNORECASE):
            return peak
    return None


def _device_name(device: Any) -> str:
    import torch  # only a caller that has a torch.device needs it

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def utilisation(flops: float, seconds: float, devices: int, device_peak: float | None) -> float | None:
    """Share of the peak of `devices` devices that `flops` in `seconds` make up; None where the peak is unknown."""
    return None if device_peak is None else flops / (seconds * devices * device_peak)
