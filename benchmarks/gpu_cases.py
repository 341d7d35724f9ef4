"""What benchmarks/gpu.py compares: every op at one sequence length, ours beside PyTorch's ways of doing the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megastage.kernels.flash_attention import attention
from megastage.kernels.global_norm import global_norm
from megastage.kernels.linear_cross_entropy import linear_cross_entropy
from megastage.kernels.optimizer import adamw_
from megastage.kernels.rms_norm import add_rms_norm, rms_norm
from megastage.kernels.rope import rope_qk, rope_reference
from megastage.kernels.swiglu import swiglu

Result = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """A model's shapes; the dry run takes toy ones."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dim: int = 4096
    ffn_dim: int = 14336
    vocab: int = 128256
    mean_document: int = 2048


TOY = Sizes(4, 2, 16, 64, 96, 200, 24)
SLOW_TO_START = ("flex",)


@dataclass
class Case:
    """inputs: leaves that need gradients (none for ops without backward). ways: name to a function of them; `ours`
    comes first. flop: of forward; backward counts `backward_flop` times as much. bytes: that forward must move."""

    op: str
    length: int
    inputs: tuple[Tensor, ...]
    ways: dict[str, Callable[..., Result]]
    flop: float = 0.0
    backward_flop: float = 2.0
    bytes: float = 0.0
    exact: str = "plain"
    trains: bool = True


def draw(*shape: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def document_ends(length: int, mean: int) -> list[int]:
    """0 and the ends of documents of 1/4 to 7/4 of the mean length, the same every time."""
    generator = torch.Generator().manual_seed(length)
    ends = [0]
    while ends[-1] < length:
        size = int(mean * (0.25 + 1.5 * torch.rand((), generator=generator).item()))
        ends.append(min(length, ends[-1] + max(size, 1)))
    return ends


@cache
def flex(length: int, ends: tuple[int, ...], device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled flex attention with a block mask: causal, and per document where there is more than one."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = torch.bucketize(torch.arange(length, device=device), torch.tensor(ends[1:], device=device), right=True)

    def causal(b, h, q, k):
        return q >= k

    def same_document(b, h, q, k):
        return (q >= k) & (document[q] == document[k])

    visible = causal if len(ends) == 2 else same_document
    mask = create_block_mask(visible, None, None, length, length, device=device, _compile=True)
    return partial(_compile(flex_attention, len(ends) == 2), block_mask=mask, enable_gqa=True)


@cache
def _compile(fn: Callable[..., Any], key: bool) -> Callable[..., Any]:
    """One compiled function a mask: the second length makes it general. fullgraph: what cannot be compiled raises,
    where the silent way out would form all scores; so would the limit on compilations."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(fn, fullgraph=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Result:
    with sdpa_kernel(backend):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return (F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2),)


def varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Result:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q[0], k[0], v[0], ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True)
    return (out[None],)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, ends: list[int]) -> Result:
    T, groups = q.shape[1], q.shape[2] // k.shape[2]
    position = torch.arange(T, device=q.device)
    document = torch.bucketize(position, torch.tensor(ends[1:], device=q.device), right=True)
    seen = (position[:, None] >= position[None, :]) & (document[:, None] == document[None, :])
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return (torch.einsum("bhts,bshd->bthd", weights, v),)


def attention_case(T: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, documents: bool, back: str) -> Case:
    H, K, D = sizes.heads, sizes.kv_heads, sizes.head_dim
    q, k, v = (draw(1, T, n, D, device=device, dtype=dtype, seed=i) for i, n in enumerate((H, K, K)))
    ends = document_ends(T, sizes.mean_document) if documents else [0, T]
    cu = torch.tensor([ends], dtype=torch.int32, device=device)
    pairs = sum((b - a) * (b - a + 1) / 2 for a, b in pairwise(ends))
    ways: dict[str, Callable[..., Result]] = {
        "ours": lambda q, k, v: (attention(q, k, v, cu if documents else None, backend=back),)
    }
    if documents:
        longest = max(b - a for a, b in pairwise(ends))
        ways["torch varlen"] = lambda q, k, v: varlen(q, k, v, cu[0], longest)
    else:
        ways["sdpa flash"] = lambda q, k, v: sdpa(q, k, v, SDPBackend.FLASH_ATTENTION)
        ways["sdpa cudnn"] = lambda q, k, v: sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION)
    if device.type == "cuda":
        ways["flex"] = lambda *qkv: (flex(T, tuple(ends), device)(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2),)
    ways["plain"] = lambda q, k, v: naive_attention(q, k, v, ends)
    name = "attention, documents" if documents else "attention, causal"
    moved = sum(x.nbytes for x in (q, q, k, v))
    return Case(name, T, (q, k, v), ways, flop=4 * pairs * H * D, backward_flop=2.5, bytes=moved)


def pointwise_cases(T: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, back: str) -> list[Case]:
    like = {"device": device, "dtype": dtype}
    x, residual, weight = draw(T, sizes.dim, **like), draw(T, sizes.dim, **like, seed=1), draw(sizes.dim, **like)
    gate, up = draw(T, sizes.ffn_dim, **like), draw(T, sizes.ffn_dim, **like, seed=1)
    q, k = draw(1, T, sizes.heads, sizes.head_dim, **like), draw(1, T, sizes.kv_heads, sizes.head_dim, **like)
    positions = (torch.arange(T, device=device) % sizes.mean_document)[None]
    angle = torch.arange(T, device=device)[:, None] * 1e4 ** -torch.linspace(0, 1, sizes.head_dim // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    shape = (sizes.dim,)

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Result:
        return F.rms_norm(x + residual, shape, weight, 1e-5), x + residual

    def rotate(q: Tensor, k: Tensor) -> Result:
        return rope_reference(q, cos, sin, positions), rope_reference(k, cos, sin, positions)

    return [
        Case(
            "rms_norm", T, (x, weight), bytes=2 * x.nbytes,
            ways={
                "ours": lambda x, w: (rms_norm(x, w, backend=back),),
                "plain": lambda x, w: (F.rms_norm(x, shape, w, 1e-5),),
            },
        ),
        Case(
            "add + rms_norm", T, (x, residual, weight), bytes=4 * x.nbytes,
            ways={"ours": lambda *a: add_rms_norm(*a, backend=back), "plain": add_norm},
        ),
        Case(
            "rope", T, (q, k), bytes=2 * (q.nbytes + k.nbytes),
            ways={"ours": lambda q, k: rope_qk(q, k, cos, sin, positions, backend=back), "plain": rotate},
        ),
        Case(
            "swiglu", T, (gate, up), bytes=3 * gate.nbytes,
            ways={
                "ours": lambda g, u: (swiglu(g, u, backend=back),),
                "plain": lambda g, u: (F.silu(g) * u,),
            },
        ),
    ]  # fmt: skip


def cross_entropy_case(T: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, back: str) -> Case:
    hidden = draw(T, sizes.dim, device=device, dtype=dtype)
    weight = draw(sizes.vocab, sizes.dim, device=device, dtype=dtype, seed=1) * sizes.dim**-0.5
    labels = torch.arange(T, device=device) * 7919 % sizes.vocab
    fused = getattr(F, "linear_cross_entropy", None)
    tiles = max(sizes.vocab // 8, 1)
    ways: dict[str, Callable[..., Result]] = {
        "ours": lambda h, w: (linear_cross_entropy(h, w, labels, reduction="mean", backend=back),),
        "ours, tiles": lambda h, w: (
            linear_cross_entropy(
                h, w, labels, reduction="mean", backend=back, chunk_tokens=8192, chunk_vocab=tiles
            ),
        ),
        "plain": lambda h, w: (F.cross_entropy((h @ w.mT).to(torch.promote_types(h.dtype, torch.float32)), labels),),
    }  # fmt: skip
    if fused is not None:
        ways["torch fused"] = lambda h, w: (fused(h, w, labels),)
    flop = 2.0 * T * sizes.dim * sizes.vocab
    return Case("linear cross-entropy", T, (hidden, weight), ways, flop=flop, bytes=weight.nbytes)


def optimizer_cases(T: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, back: str) -> list[Case]:
    """A shard of T x dim parameters in eight tensors; in place, so no case is compared with another's result."""
    tensors = [draw(T * sizes.dim // 8, device=device, dtype=torch.float32, seed=i) for i in range(8)]
    params, means = [x.clone() for x in tensors], [x * 0.1 for x in tensors]
    squares = [x.square() for x in tensors]
    owned = [x.clone().requires_grad_() for x in tensors]
    for parameter, grad in zip(owned, tensors):
        parameter.grad = grad
    ways: dict[str, Callable[..., Result]] = {"ours": lambda: step(params, tensors, means, squares, back)}
    for name in ("fused", "foreach"):
        optimizer = torch.optim.AdamW(owned, lr=1e-3, **{name: True})
        ways[f"torch {name}"] = partial(torch_step, optimizer)
    size = sum(x.nbytes for x in tensors)
    norms: dict[str, Callable[..., Result]] = {
        "ours": lambda *xs: (global_norm(xs, backend=back),),
        "plain": lambda *xs: (torch.nn.utils.get_total_norm(xs),),
    }
    return [
        Case("adamw", T, (), ways, bytes=7 * size, exact="", trains=False),
        Case("global norm", T, tuple(tensors), norms, bytes=size, trains=False),
    ]


def step(params: list[Tensor], grads: list[Tensor], means: list[Tensor], squares: list[Tensor], back: str) -> Result:
    adamw_(params, grads, means, squares, step=10, lr=1e-3, backend=back)
    return (params[0],)


def torch_step(optimizer: torch.optim.Optimizer) -> Result:
    optimizer.step()
    return ()


def case_makers(T: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, back: str) -> list[Callable[[], Any]]:
    """Functions that each make a case or a list of them, so that only one op's tensors exist at a time."""
    at = (T, sizes, device, dtype)
    return [
        partial(attention_case, *at, False, back),
        partial(attention_case, *at, True, back),
        partial(cross_entropy_case, *at, back),
        partial(pointwise_cases, *at, back),
        partial(optimizer_cases, *at, back),
    ]
