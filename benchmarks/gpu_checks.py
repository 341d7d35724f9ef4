"""What benchmarks/gpu.py checks and does not time: attention in every form, and other shapes of the other ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import Case, Place, Result, draw
from torch import Tensor

from megastage.kernels.flash_attention import attention
from megastage.kernels.global_norm import global_norm
from megastage.kernels.linear_cross_entropy import linear_cross_entropy
from megastage.kernels.optimizer import adamw_, adamw_reference_, step_scalars
from megastage.kernels.rms_norm import add_rms_norm
from megastage.kernels.rope import rope_qk, rope_reference
from megastage.kernels.swiglu import swiglu

# name to (tokens of the queries, of the keys, heads, key/value heads, head dimension, options of attention)
Form = tuple[int, int, int, int, int, dict[str, Any]]
FORMS: dict[str, Form] = {
    "head dim 64": (600, 600, 8, 2, 64, {}),
    "head dim 80, one head a group": (600, 600, 4, 4, 80, {}),
    "head dim 96, one key/value head": (600, 600, 4, 1, 96, {}),
    "head dim 100": (333, 333, 4, 1, 100, {}),
    "head dim 256": (600, 600, 4, 2, 256, {}),
    "full, other lengths": (300, 777, 4, 2, 128, {"causal": False}),
    "second half of a row": (512, 1024, 4, 2, 128, {"q_offset": 512}),
    "window": (1000, 1000, 4, 2, 128, {"window": 130}),
    "softcap": (600, 600, 4, 2, 128, {"softcap": 3.0}),
    "one token": (1, 300, 4, 2, 128, {"q_offset": 299}),
}
TOY_FORMS: dict[str, Form] = {
    "head dim 20, one head a group": (40, 40, 2, 2, 20, {}),
    "second half of a row, window, softcap": (16, 32, 4, 2, 16, {"q_offset": 16, "window": 9, "softcap": 5.0}),
}


def check_makers(place: Place) -> dict[str, Callable[[], Case]]:
    """Name to the case's maker; a name begins with the op's, so that an op that fails here is not timed either."""
    toy = place.sizes.head_dim < 64
    found: dict[str, Callable[[], Case]] = {}
    for form, values in (TOY_FORMS if toy else FORMS).items():
        for fused in (False, True) if form == "head dim 64" else (False,):
            name = f"attention, {form}{', slices of one projection' if fused else ''}"
            found[name] = partial(attention_check, name, values, place, fused)
    found["linear cross-entropy, ignored labels and z-loss"] = partial(cross_entropy_check, place, 50 if toy else 700)
    for dim in (20, 48) if toy else (48, 128, 8192):
        found[f"add + rms_norm, rows of {dim}"] = partial(norm_check, place, dim)
    for dim in (12,) if toy else (64, 80):
        found[f"rope, slices of one projection, head dim {dim}"] = partial(rope_check, place, dim)
    found["swiglu, halves of one projection"] = partial(swiglu_check, place, 37 if toy else 5000)
    for dtype, stochastic in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        name = f"adamw, {str(dtype).removeprefix('torch.')}{' stochastic' if stochastic else ''}"
        found[name] = partial(optimizer_check, name, dtype, stochastic, place)
    found["global norm, odd sizes"] = partial(global_norm_check, place)
    return found


def attention_check(name: str, form: Form, place: Place, fused: bool) -> Case:
    """Ours with its log-sum-exp against the definition; rows of four documents and of one, the last ends repeated."""
    T, S, H, K, D, options = form
    like = {"device": place.device, "dtype": place.dtype}
    sink, ends = draw(H, **like, seed=3), [0, S // 3, S // 3 + 1, S]
    cu = torch.tensor([ends, [0, S, S, S]], dtype=torch.int32, device=place.device)
    if fused:
        inputs = (draw(2, T, H + 2 * K, D, **like), sink)
    else:
        inputs = (draw(2, T, H, D, **like), *(draw(2, S, K, D, **like, seed=i) for i in (1, 2)), sink)

    def parts(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*tensors[0].split((H, K, K), 2), tensors[1]) if fused else tensors

    def ours(*tensors: Tensor) -> Result:
        q, k, v, sink = parts(tensors)
        return attention(q, k, v, cu, sink_H=sink, return_lse=True, backend=place.back, **options)

    return Case(name, T, inputs, {"ours": ours, "plain": lambda *x: definition(*parts(x), cu, **options)})


def definition(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor, cu: Tensor,
    causal: bool = True, q_offset: int = 0, window: int = 0, softcap: float = 0.0,
) -> Result:  # fmt: skip
    """Attention written out. Every query here sees a key: an empty row would be NaN."""
    T, S, D, groups = q.shape[1], k.shape[1], q.shape[3], q.shape[2] // k.shape[2]
    query = torch.arange(T, device=q.device)[:, None] + q_offset
    key = torch.arange(S, device=q.device)[None, :]
    positions = torch.arange(S, dtype=torch.int32, device=q.device).expand(2, S).contiguous()
    document = torch.searchsorted(cu[:, 1:].contiguous(), positions, right=True)
    seen = document[:, q_offset : q_offset + T, None] == document[:, None, :]
    if causal:
        seen = seen & (query >= key)
    if window:
        seen = seen & (query - key < window)
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * D**-0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    scores = torch.cat((scores, sink[None, :, None, None].expand(q.shape[0], -1, T, 1)), 3)
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(3)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(3)[..., :-1], v), lse


def cross_entropy_check(place: Place, tokens: int) -> Case:
    """The vocabulary is no multiple of a block, and chunks leave a rest."""
    dim, vocab, z_loss = (64, 203, 1e-2) if tokens < 100 else (256, 5003, 1e-2)
    like = {"device": place.device, "dtype": place.dtype}
    hidden, weight = draw(tokens, dim, **like), draw(vocab, dim, **like, seed=1) * dim**-0.5
    labels = torch.arange(tokens, device=place.device) * 7919 % vocab
    labels[::3] = -100

    def ours(h: Tensor, w: Tensor) -> Result:
        return (
            linear_cross_entropy(
                h, w, labels, z_loss=z_loss, chunk_tokens=tokens // 3, chunk_vocab=1 + vocab // 3, backend=place.back
            ),
        )

    def plain(h: Tensor, w: Tensor) -> Result:
        logits = (h @ w.mT).to(torch.promote_types(h.dtype, torch.float32))
        squares = logits.logsumexp(1).square() * (labels != -100)
        return (F.cross_entropy(logits, labels, reduction="sum") + z_loss * squares.sum(),)

    name = "linear cross-entropy, ignored labels and z-loss"
    return Case(name, tokens, (hidden, weight), {"ours": ours, "plain": plain}, repeats=False)


def norm_check(place: Place, dim: int) -> Case:
    """Rows with a gap behind each, and gradients through both results."""
    like = {"device": place.device, "dtype": place.dtype}
    inputs = (draw(301, 2, dim, **like), draw(301, dim, **like, seed=1), draw(dim, **like, seed=2))

    def plain(x: Tensor, residual: Tensor, weight: Tensor) -> Result:
        return F.rms_norm(x[:, 1] + residual, (dim,), weight, 1e-5), x[:, 1] + residual

    ours = lambda x, residual, weight: add_rms_norm(x[:, 1], residual, weight, backend=place.back)
    return Case(f"add + rms_norm, rows of {dim}", 301, inputs, {"ours": ours, "plain": plain})


def rope_check(place: Place, dim: int) -> Case:
    heads, kv_heads, tokens = 6, 2, 129
    qkv = draw(2, tokens, heads + 2 * kv_heads, dim, device=place.device, dtype=place.dtype)
    positions = torch.arange(2 * tokens, device=place.device).view(2, tokens) % 100
    angle = torch.arange(100, device=place.device)[:, None] / torch.arange(1, dim // 2 + 1, device=place.device)
    tables = (angle.cos(), angle.sin(), positions)
    parts = lambda qkv: qkv.split((heads, kv_heads, kv_heads), 2)[:2]
    ways: dict[str, Callable[..., Result]] = {
        "ours": lambda qkv: rope_qk(*parts(qkv), *tables, backend=place.back),
        "plain": lambda qkv: tuple(rope_reference(x, *tables) for x in parts(qkv)),
    }
    return Case(f"rope, slices of one projection, head dim {dim}", tokens, (qkv,), ways)


def swiglu_check(place: Place, width: int) -> Case:
    both = draw(77, 2 * width, device=place.device, dtype=place.dtype)
    ways: dict[str, Callable[..., Result]] = {
        "ours": lambda x: (swiglu(*x.chunk(2, -1), backend=place.back),),
        "plain": lambda x: (F.silu(x[:, :width]) * x[:, width:],),
    }
    return Case("swiglu, halves of one projection", 77, (both,), ways)


def optimizer_check(name: str, dtype: torch.dtype, stochastic: bool, place: Place) -> Case:
    """One step of two tensors from given states, of which the second begins at an odd address."""
    param, grad, mean = (draw(10007, device=place.device, dtype=dtype, seed=i) for i in range(3))
    scale = torch.full((), 0.7, device=place.device)

    def both(tensors: tuple[Tensor, ...]) -> list[list[Tensor]]:
        return [[x[:6000], x[6001:]] for x in tensors]

    def ours(*tensors: Tensor) -> Result:
        copies = tuple(x.clone() for x in tensors)
        options = {"stochastic_rounding": stochastic, "seed": 5, "grad_scale": scale}
        adamw_(*both(copies), step=3, lr=1e-2, backend=place.back, **options)
        return copies[0], copies[2], copies[3]

    def plain(*tensors: Tensor) -> Result:
        copies = tuple(x.clone() for x in tensors)
        adamw_reference_(*both(copies), scale, step_scalars(3, 1e-2, (0.9, 0.95), 1e-8, 0.1), False, 5)
        return copies[0], copies[2], copies[3]

    return Case(name, 10007, (param, grad, mean, mean.square()), {"ours": ours, "plain": plain}, trains=False)


def global_norm_check(place: Place) -> Case:
    """Empty, tiny, unaligned and large tensors of two dtypes; against the norm of all of it in one."""
    wide = torch.promote_types(place.dtype, torch.float32)
    numbers = [draw(n, device=place.device, dtype=wide, seed=n) for n in (0, 1, 8192, 20001)]
    numbers += [numbers[-1][1:].to(place.dtype)]
    ways: dict[str, Callable[..., Result]] = {
        "ours": lambda *xs: (global_norm(xs, backend=place.back),),
        "plain": lambda *xs: (torch.cat([x.to(torch.promote_types(x.dtype, wide)) for x in xs]).norm(),),
    }
    return Case("global norm, odd sizes", 28194, tuple(numbers), ways, trains=False)
