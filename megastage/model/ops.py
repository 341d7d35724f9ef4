"""The operations a decoder calls, as one object: back ends are chosen once, and parallel code may replace any op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from megastage.kernels.flash_attention import attention
from megastage.kernels.rms_norm import add_rms_norm, rms_norm
from megastage.kernels.rope import rope_qk
from megastage.kernels.swiglu import swiglu

MODEL_OPS = ("flash_attention", "rms_norm", "rope", "swiglu")


@dataclass(frozen=True)
class Ops:
    """Callables with the contracts of `megastage.kernels`; each takes tensors only (back end already bound).

    attention(q_BTHD, k_BSKD, v_BSKD, cu_seqlens_BC) -> [B, T, H, D], causal within each document
    rms_norm(x, weight_D, eps) -> like x
    add_rms_norm(x, residual, weight_D, eps) -> (norm of the sum, the sum)
    rope_qk(q_BTHD, k_BTKD, cos_PF, sin_PF, positions_BT) -> (q, k)
    swiglu(gate, up) -> silu(gate) * up
    """

    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = attention
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = add_rms_norm
    rope_qk: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = rope_qk
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu

    @classmethod
    def from_backends(cls, backends: Mapping[str, str]) -> Ops:
        """Bind the back end ("auto", "triton" or "torch") named for each of MODEL_OPS; a missing name means "auto"."""
        chosen = {name: backends.get(name, "auto") for name in MODEL_OPS}
        return cls(
            attention=partial(attention, backend=chosen["flash_attention"]),
            rms_norm=partial(rms_norm, backend=chosen["rms_norm"]),
            add_rms_norm=partial(add_rms_norm, backend=chosen["rms_norm"]),
            rope_qk=partial(rope_qk, backend=chosen["rope"]),
            swiglu=partial(swiglu, backend=chosen["swiglu"]),
        )
