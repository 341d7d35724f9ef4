"""RMSNorm (Zhang & Sennrich 2019), optionally fused with the residual addition before it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megastage.kernels.dispatch import same_device, use_triton

MAX_TRITON_DIM = 32768  # a row is held in registers by one program
# Rows below it are computed in fp64: their gradient is a difference of nearly equal terms, which fp32 leaves few digits
SHORT_ROW = 64


def rms_norm(x: Tensor, weight_D: Tensor, eps: float = 1e-5, *, backend: str = "auto") -> Tensor:
    """RMSNorm over the last dimension; x [..., D] and the result share shape and dtype. The weight's may differ."""
    _check(x, weight_D)
    if _on_triton(backend, x):
        return rms_norm_op(x, weight_D, eps)[0]
    return _RMSNorm.apply(x, weight_D, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, eps: float = 1e-5, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass over memory; x and residual share shape and dtype."""
    _check(x, weight_D)
    same_device("add_rms_norm", x=x, residual=residual)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} and residual {tuple(residual.shape)} {residual.dtype} must be alike"
        )
    if _on_triton(backend, x):
        normed, total, _ = add_rms_norm_op(x, residual, weight_D, eps)
        return normed, total
    total = x + residual
    return _RMSNorm.apply(total, weight_D, eps), total


def rms_norm_reference(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension; statistics in fp32 (fp64 for fp64 input)."""
    acc = x if x.dtype == torch.float64 else x.float()
    normed = acc * torch.rsqrt(acc.square().mean(-1, keepdim=True) + eps)
    return (normed * weight_D.to(acc.dtype)).to(x.dtype)


def _check(x: Tensor, weight_D: Tensor) -> None:
    if x.ndim == 0 or weight_D.shape != x.shape[-1:]:
        sizes = f"{tuple(x.shape)} and {tuple(weight_D.shape)}"
        raise ValueError(f"rms_norm takes x [..., D] and a weight [D], not {sizes}")
    if not (x.is_floating_point() and weight_D.is_floating_point()):
        raise ValueError(f"rms_norm takes floating-point numbers, not x in {x.dtype} and a weight in {weight_D.dtype}")
    same_device("rms_norm", x=x, weight=weight_D)


def _on_triton(backend: str, x: Tensor) -> bool:
    if not use_triton(backend, x.device, "rms_norm", x.dtype):
        return False
    if x.shape[-1] > MAX_TRITON_DIM and backend == "triton":
        raise ValueError(f'rms_norm = "triton" takes rows to {MAX_TRITON_DIM}, not {x.shape[-1]}: use "auto"')
    return x.shape[-1] <= MAX_TRITON_DIM


class _RMSNorm(torch.autograd.Function):
    """The reference with its gradient by hand: half the passes over memory of the one that autograd derives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        acc = x.double() if x.shape[-1] < SHORT_ROW or x.dtype == torch.float64 else x.float()
        # the sum in fp64 costs no time: the pass is bound by memory
        norm = torch.linalg.vector_norm(acc, dim=-1, keepdim=True, dtype=torch.float64)
        rstd = (norm.square_() / x.shape[-1] + eps).rsqrt_().to(acc.dtype)
        ctx.save_for_backward(x, weight_D, rstd)
        return (acc * rstd).mul_(weight_D).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_RMSNormGradient.apply(grads[0], *ctx.saved_tensors), None


class _RMSNormGradient(torch.autograd.Function):
    """A function of its own, so that a second derivative is refused: through saved 1/rms it would be wrong."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        normed = x.to(rstd.dtype) * rstd
        grad = grad.to(rstd.dtype)
        product = (grad * normed).reshape(rstd.numel(), x.shape[-1])
        grad_weight = product.sum(0).to(weight_D.dtype)
        mean = torch.mv(product, weight_D.to(rstd.dtype)).view(rstd.shape) / x.shape[-1]
        grad_x = (grad * weight_D).sub_(normed.mul_(mean)).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("rms_norm has no second derivative: torch.nn.functional.rms_norm does")


@torch.library.custom_op("megastage::rms_norm", mutates_args=())
def rms_norm_op(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, 1/rms of each row: fp32, or fp64 for fp32 rows)."""
    from megastage.kernels import rms_norm_triton

    normed, _, rstd_N = rms_norm_triton.forward(x, None, weight_D, eps)
    return normed, rstd_N


@torch.library.custom_op("megastage::add_rms_norm", mutates_args=())
def add_rms_norm_op(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, x + residual, 1/rms of each row as in `rms_norm_op`)."""
    from megastage.kernels import rms_norm_triton

    return rms_norm_triton.forward(x, residual, weight_D, eps)


@torch.library.custom_op("megastage::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight_D: Tensor, rstd_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by the normed tensor (and the residual, `grad_total` added) and by the weight."""
    from megastage.kernels import rms_norm_triton

    return rms_norm_triton.backward(grad, grad_total, x, weight_D, rstd_N)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """What the kernels compute in: twice the digits of what is stored, so that only the last rounding shows."""
    return torch.float64 if x.dtype == torch.float32 or x.shape[-1] < SHORT_ROW else torch.float32


def _empty_rows(x: Tensor) -> Tensor:
    # not Size.numel(), which would bind a compiled graph to this number of rows
    return x.new_empty(math.prod(x.shape[:-1]), dtype=statistics_dtype(x))


@rms_norm_op.register_fake
def _(x, weight_D, eps):
    return x.new_empty(x.shape), _empty_rows(x)


@add_rms_norm_op.register_fake
def _(x, residual, weight_D, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), _empty_rows(x)


@rms_norm_backward_op.register_fake
def _(grad, grad_total, x, weight_D, rstd_N):
    return x.new_empty(x.shape), torch.empty_like(weight_D)


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _backward(ctx, grad, _):
    if grad is None:
        return None, None, None
    return *rms_norm_backward_op(grad, None, *ctx.saved_tensors), None


def _setup_add(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], inputs[2], output[2])


def _backward_add(ctx, grad, grad_total, _):
    if grad is None:
        return grad_total, grad_total, None, None
    grad_x, grad_weight = rms_norm_backward_op(grad, grad_total, *ctx.saved_tensors)
    return grad_x, grad_x, grad_weight, None


rms_norm_op.register_autograd(_backward, setup_context=_setup)
add_rms_norm_op.register_autograd(_backward_add, setup_context=_setup_add)
