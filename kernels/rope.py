"""Rotary position embedding (Su et al. 2021), half-split layout: pairs are (i, i + D/2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megastage.kernels.dispatch import same_device, use_triton


def rope_reference(x_BTHD: Tensor, cos_PF: Tensor, sin_PF: Tensor, positions_BT: Tensor) -> Tensor:
    """Rotate x [B, T, H, D] by the angles of `positions_BT`; tables are [positions, D/2] in fp32, arithmetic in fp32
    (fp64 for fp64 input)."""
    cos = F.embedding(positions_BT, cos_PF)[:, :, None, :]  # unlike an index, it takes no position from the end
    sin = F.embedding(positions_BT, sin_PF)[:, :, None, :]
    low, high = x_BTHD.to(torch.promote_types(x_BTHD.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x_BTHD.dtype)


def rope_qk(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    cos_PF: Tensor,
    sin_PF: Tensor,
    positions_BT: Tensor,
    *,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys together. Positions are integers [B, T] and restart wherever a document does. The tables
    receive no gradient.

    inplace: overwrite q and k where no gradient is recorded (inference, validation, a recomputed forward's first
    pass); where one is, autograd forbids it and new tensors are made: either way the results are returned.
    A position outside the tables is an IndexError in the reference on a CPU and NaN in the kernel.
    """
    _check(q_BTHD, k_BTKD, cos_PF, sin_PF, positions_BT)
    recorded = torch.is_grad_enabled() and (q_BTHD.requires_grad or k_BTKD.requires_grad)
    if use_triton(backend, q_BTHD.device, "rope", q_BTHD.dtype):
        if inplace and not recorded:
            rope_qk_inplace_op(q_BTHD, k_BTKD, cos_PF, sin_PF, positions_BT)
            return q_BTHD, k_BTKD
        return rope_qk_op(q_BTHD, k_BTKD, cos_PF, sin_PF, positions_BT, False)
    q_out = rope_reference(q_BTHD, cos_PF, sin_PF, positions_BT)
    k_out = rope_reference(k_BTKD, cos_PF, sin_PF, positions_BT)
    if inplace and not recorded:
        return q_BTHD.copy_(q_out), k_BTKD.copy_(k_out)
    return q_out, k_out


def _check(q_BTHD: Tensor, k_BTKD: Tensor, cos_PF: Tensor, sin_PF: Tensor, positions_BT: Tensor) -> None:
    four = q_BTHD.ndim == k_BTKD.ndim == 4
    B, T, _, D = q_BTHD.shape if four else (0, 0, 0, 1)
    if D % 2 or k_BTKD.shape[:2] != (B, T) or k_BTKD.shape[3] != D or positions_BT.shape != (B, T):
        raise ValueError(
            f"rope_qk takes q [B, T, H, D], k [B, T, K, D] and positions [B, T] with an even D, not "
            f"{tuple(q_BTHD.shape)}, {tuple(k_BTKD.shape)} and {tuple(positions_BT.shape)}"
        )
    if cos_PF.shape != sin_PF.shape or cos_PF.ndim != 2 or cos_PF.shape[1] != D // 2:
        raise ValueError(f"the rope tables must both be [positions, {D // 2}], not {tuple(cos_PF.shape)}")
    if cos_PF.stride() != sin_PF.stride() or cos_PF.stride(1) != 1:
        raise ValueError("the rope tables must be laid out alike, with the angles of a position side by side")
    if cos_PF.requires_grad or sin_PF.requires_grad:
        raise ValueError("rope_qk gives its tables no gradient: detach them")
    if q_BTHD.dtype != k_BTKD.dtype or positions_BT.dtype not in (torch.int64, torch.int32):
        types = f"q in {q_BTHD.dtype}, k in {k_BTKD.dtype} and positions in {positions_BT.dtype}"
        raise ValueError(f"rope_qk takes q and k of one type and positions in int64 or int32, not {types}")
    same_device("rope_qk", q=q_BTHD, k=k_BTKD, cos=cos_PF, sin=sin_PF, positions=positions_BT)


@torch.library.custom_op("megastage::rope_qk", mutates_args=())
def rope_qk_op(
    q_BTHD: Tensor, k_BTKD: Tensor, cos_PF: Tensor, sin_PF: Tensor, positions_BT: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Rotated q and k, contiguous; `inverse` rotates back, which is also the gradient."""
    from megastage.kernels import rope_triton

    q_out, k_out = q_BTHD.new_empty(q_BTHD.shape), k_BTKD.new_empty(k_BTKD.shape)
    rope_triton.rotate(q_BTHD, k_BTKD, cos_PF, sin_PF, positions_BT, inverse, q_out, k_out)
    return q_out, k_out


@rope_qk_op.register_fake
def _(q_BTHD, k_BTKD, cos_PF, sin_PF, positions_BT, inverse):
    return q_BTHD.new_empty(q_BTHD.shape), k_BTKD.new_empty(k_BTKD.shape)


@torch.library.custom_op("megastage::rope_qk_inplace", mutates_args=("q_BTHD", "k_BTKD"))
def rope_qk_inplace_op(q_BTHD: Tensor, k_BTKD: Tensor, cos_PF: Tensor, sin_PF: Tensor, positions_BT: Tensor) -> None:
    """Rotate q and k where they lie."""
    from megastage.kernels import rope_triton

    for x in (q_BTHD, k_BTKD):
        if x.stride(-1) != 1 or any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride())):
            raise ValueError(
                f"rope in place takes q and k with unit stride in the head dimension and no element twice, not strides "
                f"{x.stride()}: make them contiguous"
            )
    rope_triton.rotate(q_BTHD, k_BTKD, cos_PF, sin_PF, positions_BT, False, q_BTHD, k_BTKD)


@rope_qk_inplace_op.register_fake
def _(q_BTHD, k_BTKD, cos_PF, sin_PF, positions_BT):
    return None


def _setup_context(ctx, inputs, output) -> None:
    _, _, cos_PF, sin_PF, positions_BT, ctx.inverse = inputs
    ctx.save_for_backward(cos_PF, sin_PF, positions_BT)


def _backward(ctx, grad_q, grad_k):
    grads = rope_qk_op(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse)
    return *grads, None, None, None, None


rope_qk_op.register_autograd(_backward, setup_context=_setup_context)
