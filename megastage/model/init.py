"""Initial weights that depend on the seed and the parameter's name alone, never on the layout.

A parameter is cut into blocks of whole rows; each block has its own counter-based stream (Philox, Salmon et al. 2011),
keyed by (seed, name) with the block's index in the counter. A rank therefore makes only the blocks that touch its rows,
and any rank that needs a row gets the same bits. NumPy's generator is used rather than PyTorch's because the latter
takes other code paths, with other roundings, on processors with other vector units.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megastage.model.config import ModelConfig

BLOCK_ELEMENTS = 1 << 16
_RESIDUAL_OUTPUT = re.compile(r"(attention\.wo|feed_forward\.w2)\.weight$")
_NORM = re.compile(r"(^|[._])norm\.weight$")

Plan = tuple[str, float]


def init_plan(cfg: ModelConfig, name: str) -> Plan:
    """("normal", std) or ("ones", 0.0) for a parameter of the whole model.

    Matrices and embeddings: std `cfg.init_std`. Projections that write into the residual stream: that divided by
    sqrt(2 n_layers), so that the stream's variance does not grow with depth (Radford et al. 2019).
    """
    if _NORM.search(name):
        return "ones", 0.0
    if _RESIDUAL_OUTPUT.search(name):
        return "normal", cfg.init_std / math.sqrt(2 * cfg.n_layers)
    return "normal", cfg.init_std


def init_rows(
    name: str, global_shape: Sequence[int], plan: Plan, seed: int, row_start: int = 0, row_stop: int | None = None
) -> Tensor:
    """Rows [row_start, row_stop) of the initial value of parameter `name`: fp32 on the CPU.

    global_shape: the whole parameter's; the values of a row do not depend on the number of rows. A tied weight has one
    name (the embedding's) and is therefore made equal wherever it stands. seed: any int.
    """
    row_stop = global_shape[0] if row_stop is None else row_stop
    assert 0 <= row_start <= row_stop <= global_shape[0], (name, tuple(global_shape), row_start, row_stop)
    kind, std = plan
    if kind == "ones":
        return torch.ones(row_stop - row_start, *global_shape[1:], device="cpu")
    assert kind == "normal", kind
    width = math.prod(global_shape[1:])
    block_rows = max(1, BLOCK_ELEMENTS // max(1, width))
    out = np.empty((row_stop - row_start, width), np.float32)
    key = np.frombuffer(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "<u8")
    for block in range(row_start // block_rows, -(-row_stop // block_rows)):
        first, last = max(block * block_rows, row_start), min((block + 1) * block_rows, row_stop)
        stream = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, block]))
        # rows follow each other in the stream, so a block is made up to the last row asked for
        made = stream.standard_normal((last - block * block_rows, width), np.float32)
        np.multiply(made[first - block * block_rows :], np.float32(std), out=out[first - row_start : last - row_start])
    return torch.from_numpy(out).view(row_stop - row_start, *global_shape[1:])
