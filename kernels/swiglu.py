"""SwiGLU activation (Shazeer 2020): silu(gate) * up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megastage.kernels.dispatch import same_device, use_triton


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, in the inputs' dtype."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) * up; both inputs share shape and dtype. The kernel rounds once, computing in fp32."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must be alike")
    same_device("swiglu", gate=gate, up=up)
    if gate.ndim and use_triton(backend, gate.device, "swiglu", gate.dtype):
        return swiglu_op(gate, up)
    return swiglu_reference(gate, up)


@torch.library.custom_op("megastage::swiglu", mutates_args=())
def swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    from megastage.kernels import swiglu_triton

    return swiglu_triton.forward(gate, up)


@torch.library.custom_op("megastage::swiglu_backward", mutates_args=())
def swiglu_backward_op(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients by gate and by up."""
    from megastage.kernels import swiglu_triton

    return swiglu_triton.backward(grad, gate, up)


@swiglu_op.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@swiglu_backward_op.register_fake
def _(grad, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return swiglu_backward_op(grad, *ctx.saved_tensors)


swiglu_op.register_autograd(_backward, setup_context=_setup_context)
