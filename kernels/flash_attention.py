"""Exact attention over packed documents (Dao et al. 2022 for the tiled method): shapes are B T H D for queries, B S K D
for keys and values, K key/value heads shared by H/K query heads each (Ainslie et al. 2023).

`cu_seqlens_BC` (int32) lists, per row, 0 and the document ends in ascending order; the last end is repeated as padding.
A query at row position p attends only to keys of its own document; positions beyond the last end give 0 and lse -inf.

Triton kernels on GPUs (kernels/_attention_forward.py, _attention_backward.py), PyTorch elsewhere
(kernels/_attention_reference.py); both behind one custom operator, whose backward is an operator of its own.
"""

from __future__ import annotations

import functools
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megastage.kernels import _attention_reference as reference
from megastage.kernels._attention_reference import Geometry
from megastage.kernels.dispatch import same_device, use_triton

MAX_HEAD_DIM = 256
_OPTIONS = "bool causal, float scale, SymInt q_offset, SymInt window, float softcap, str backend"


@overload
def attention(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, cu_seqlens_BC: Tensor | None = ..., *, causal: bool = ...,
    scale: float | None = ..., q_offset: int = ..., window: int | None = ..., softcap: float | None = ...,
    sink_H: Tensor | None = ..., return_lse: Literal[False] = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, cu_seqlens_BC: Tensor | None = ..., *, causal: bool = ...,
    scale: float | None = ..., q_offset: int = ..., window: int | None = ..., softcap: float | None = ...,
    sink_H: Tensor | None = ..., return_lse: Literal[True], backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    cu_seqlens_BC: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    q_offset: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention output [B, T, H, D] in the dtype of q; with `return_lse` also the log-sum-exp, fp32 [B, H, T].

    scale: > 0, default D^-0.5. q_offset: row position of the first query relative to the first key (context
    parallelism); it may be negative, and document bounds, counted from the first key too, may lie outside [0, S].
    window: a query at p sees keys in (p - window, p], and up to p + window - 1 when not causal.
    softcap: scores become softcap * tanh(score / softcap) before the mask. sink_H: one more logit per query head that
    takes probability and gives no value; it enters the log-sum-exp of every query that sees a key.
    backend: "auto" is "triton" for CUDA tensors and "torch" for others. Both results and all tensor arguments but
    cu_seqlens_BC are differentiable, once. Raises ValueError for shapes, dtypes or options that do not fit.
    """
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else float(scale)
    _check(q_BTHD, k_BSKD, v_BSKD, cu_seqlens_BC, sink_H, scale, window, softcap)
    backend = "triton" if use_triton(backend, q_BTHD.device, "flash_attention", q_BTHD.dtype) else "torch"
    if cu_seqlens_BC is not None:
        cu_seqlens_BC = cu_seqlens_BC.to(torch.int32).contiguous()
    out, lse, _ = attention_op(
        q_BTHD, k_BSKD, v_BSKD, cu_seqlens_BC, sink_H, causal, scale, q_offset, window or 0, softcap or 0.0, backend
    )
    return (out, lse) if return_lse else out


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, sink: Tensor | None,
    scale: float, window: int | None, softcap: float | None,
) -> None:  # fmt: skip
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise ValueError(f"attention: {shapes}: expected q [B, T, H, D] and k, v [B, S, K, D]")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads cannot share {k.shape[2]} key/value heads evenly")
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"attention: head dimension {q.shape[3]} is outside 1..{MAX_HEAD_DIM}")
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.is_floating_point():
        raise ValueError(f"attention: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: give one floating dtype")
    named = {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens, "sink": sink}
    same_device("attention", **{name: x for name, x in named.items() if x is not None})
    if cu_seqlens is not None and (cu_seqlens.dim() != 2 or cu_seqlens.shape[0] != q.shape[0]):
        raise ValueError(f"attention: cu_seqlens {list(cu_seqlens.shape)}: expected [B={q.shape[0]}, bounds]")
    if sink is not None and sink.shape != (q.shape[2],):
        raise ValueError(f"attention: sink {list(sink.shape)}: expected [H={q.shape[2]}]")
    for name, value in (("scale", scale), ("window", window), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise ValueError(f"attention: {name} = {value} must be positive (None turns window and softcap off)")


def _launcher():
    """The Triton side, imported at first use: without a GPU nothing of it is needed."""
    from megastage.kernels import _attention_launch

    return _attention_launch


@torch.library.custom_op(
    "megastage::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, Tensor? sink, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def attention_op(q, k, v, cu_seqlens, sink, causal, scale, q_offset, window, softcap, backend):
    """(out, lse, stats): stats is what Triton's backward needs beyond lse for fp32 inputs, else empty."""
    geometry = Geometry(causal, scale, q_offset, window, softcap)
    if backend == "triton":
        return _launcher().forward(q, k, v, cu_seqlens, sink, geometry)
    return *reference.attention_forward(q, k, v, cu_seqlens, sink, geometry), q.new_empty(0, dtype=torch.float32)


@attention_op.register_fake
def _(q, k, v, cu_seqlens, sink, causal, scale, q_offset, window, softcap, backend):
    B, T, H, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    stats = (2, B, H, T) if backend == "triton" and q.dtype == torch.float32 else 0
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=wide), q.new_empty(stats, dtype=torch.float32)


@torch.library.custom_op(
    "megastage::attention_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor stats, "
    f"Tensor? cu_seqlens, Tensor? sink, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def attention_backward_op(
    dout, dlse, q, k, v, out, lse, stats, cu_seqlens, sink, causal, scale, q_offset, window, softcap, backend
):
    geometry = Geometry(causal, scale, q_offset, window, softcap)
    if backend == "triton":
        return _launcher().backward(dout, dlse, q, k, v, out, lse, stats, cu_seqlens, sink, geometry)
    return reference.attention_backward(dout, dlse, q, k, v, out, lse, cu_seqlens, sink, geometry)


@attention_backward_op.register_fake
def _(dout, dlse, q, k, v, out, lse, stats, cu_seqlens, sink, causal, scale, q_offset, window, softcap, backend):
    dsink = q.new_empty(0) if sink is None else sink.new_empty(sink.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsink


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens, sink, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, sink)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, _):
    q, k, v, out, lse, stats, cu_seqlens, sink = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dsink = attention_backward_op(dout, dlse, q, k, v, out, lse, stats, cu_seqlens, sink, *ctx.options)
    return dq, dk, dv, None, None if sink is None else dsink, *[None] * len(ctx.options)


attention_op.register_autograd(_backward, setup_context=_setup_context)


@functools.cache
def attended_pairs(T: int, S: int, causal: bool, q_offset: int, window: int) -> int:
    """Number of (query, key) pairs of one row of one document. Document bounds are data, so FLOP counts omit them."""
    total = 0
    for t in range(T) if causal or window else ():
        low, high = 0, S
        if causal:
            high = min(high, t + q_offset + 1)
        if window:
            low = max(low, t + q_offset - window + 1)
            if not causal:
                high = min(high, t + q_offset + window)
        total += max(0, min(high, S) - max(low, 0))
    return total if causal or window else T * S


def _flop(q_shape, k_shape, causal: bool, q_offset: int, window: int, products: int) -> int:
    B, T, H, D = q_shape
    return 2 * products * B * H * D * attended_pairs(T, k_shape[1], causal, q_offset, window)


@register_flop_formula(torch.ops.megastage.attention)
def _forward_flop(q, k, v, cu_seqlens, sink, causal, scale, q_offset, window, *_, **__) -> int:
    return _flop(q, k, causal, q_offset, window, 2)


@register_flop_formula(torch.ops.megastage.attention_backward)
def _backward_flop(dout, dlse, q, k, v, out, lse, stats, cu, sink, causal, scale, q_offset, window, *_, **__) -> int:
    """Five products, as model FLOPs count them; the split backward computes two of them twice."""
    return _flop(q, k, causal, q_offset, window, 5)
