"""SwiGLU activation (Shazeer 2020): silu(gate) * up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, in the inputs' dtype."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up; both inputs share shape and dtype."""
    return swiglu_reference(gate, up)
