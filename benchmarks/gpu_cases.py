"""What benchmarks/gpu.py compares: every op at one sequence length, ours beside PyTorch's ways of doing the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

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
CAUSAL, DOCUMENTS = "attention, causal", "attention, documents"
FLEX_BLOCK = 128


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


class Place(NamedTuple):
    """Where and how a case is made. back: the back end of our ops."""

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    back: str = "triton"


@dataclass
class Case:
    """inputs: leaves that need gradients (none for ops without backward). ways: name to a function of them; `ours`
    comes first. flop: of forward; backward counts `backward_flop` times as much. bytes: that forward must move.
    repeats: the same numbers give the same bits (products by the vendor's library promise less)."""

    op: str
    length: int
    inputs: tuple[Tensor, ...]
    ways: dict[str, Callable[..., Result]]
    flop: float = 0.0
    backward_flop: float = 2.0
    bytes: float = 0.0
    exact: str = "plain"
    trains: bool = True
    repeats: bool = True


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


def block_mask(length: int, ends: tuple[int, ...], device: torch.device) -> Any:
    """flex attention's mask, causal within documents, from the documents of the first and last token of each block.

    PyTorch's own way evaluates the mask for every pair of tokens, 16 GiB at 128k, or compiles for that.
    """
    from torch.nn.attention.flex_attention import BlockMask

    document = torch.bucketize(torch.arange(length, device=device), torch.tensor(ends[1:], device=device), right=True)
    first = document[::FLEX_BLOCK]
    last = document[torch.arange(1, len(first) + 1, device=device).mul(FLEX_BLOCK).clamp(max=length) - 1]
    block = torch.arange(len(first), device=device)
    query, key = block[:, None], block[None, :]
    seen = (key <= query) & (last[None, :] >= first[:, None])
    whole = (key < query) & (first[None, :] == last[:, None]) & ((query + 1) * FLEX_BLOCK <= length)

    def visible(b, h, q, k):
        return (q >= k) & (document[q] == document[k])

    def causal(b, h, q, k):
        return q >= k

    lists: list[Tensor] = []
    for blocks in (seen & ~whole, whole):
        order = torch.argsort(blocks.to(torch.int8), dim=1, descending=True, stable=True)
        lists += [blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]]
    mask_mod = causal if len(ends) == 2 else visible
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod, seq_lengths=(length, length))


@cache
def flex(length: int, ends: tuple[int, ...], device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Compiled flex attention with a block mask: causal, and per document where there is more than one.

    For each length anew: compiled for any, it could not know that blocks divide rows, and would be slower than it is.
    fullgraph: what cannot be compiled raises, where the silent way out would form all scores.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return partial(compiled, block_mask=block_mask(length, ends, device), enable_gqa=True)


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


def attention_case(name: str, T: int, place: Place) -> Case:
    sizes, device, dtype, back = place
    H, K, D = sizes.heads, sizes.kv_heads, sizes.head_dim
    q, k, v = (draw(1, T, n, D, device=device, dtype=dtype, seed=i) for i, n in enumerate((H, K, K)))
    ends = document_ends(T, sizes.mean_document) if name == DOCUMENTS else [0, T]
    cu = torch.tensor([ends], dtype=torch.int32, device=device)
    longest = max(b - a for a, b in pairwise(ends))
    pairs = sum((b - a) * (b - a + 1) / 2 for a, b in pairwise(ends))
    ways: dict[str, Callable[..., Result]] = {
        "ours": lambda q, k, v: (attention(q, k, v, cu if name == DOCUMENTS else None, backend=back),),
        "torch varlen": lambda q, k, v: varlen(q, k, v, cu[0], longest),
        "sdpa flash": lambda q, k, v: sdpa(q, k, v, SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": lambda q, k, v: sdpa(q, k, v, SDPBackend.CUDNN_ATTENTION),
        "flex": lambda *qkv: (flex(T, tuple(ends), device)(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2),),
        "plain": lambda q, k, v: naive_attention(q, k, v, ends),
    }
    ways = {way: ways[way] for way in OPS[name].ways}
    moved = sum(x.nbytes for x in (q, q, k, v))
    return Case(name, T, (q, k, v), ways, flop=4 * pairs * H * D, backward_flop=2.5, bytes=moved)


def norm_case(name: str, T: int, place: Place) -> Case:
    like, back = {"device": place.device, "dtype": place.dtype}, place.back
    shape = (place.sizes.dim,)
    x, weight, residual = draw(T, *shape, **like), draw(*shape, **like, seed=1), draw(T, *shape, **like, seed=2)

    def add_norm(x: Tensor, weight: Tensor, residual: Tensor) -> Result:
        return F.rms_norm(x + residual, shape, weight, 1e-5), x + residual

    if name == "rms_norm":
        alone: dict[str, Callable[..., Result]] = {
            "ours": lambda x, w: (rms_norm(x, w, backend=back),),
            "plain": lambda x, w: (F.rms_norm(x, shape, w, 1e-5),),
        }
        return Case(name, T, (x, weight), alone, bytes=2 * x.nbytes)
    ways: dict[str, Callable[..., Result]] = {
        "ours": lambda x, w, residual: add_rms_norm(x, residual, w, backend=back),
        "plain": add_norm,
    }
    return Case(name, T, (x, weight, residual), ways, bytes=4 * x.nbytes)


def rope_case(name: str, T: int, place: Place) -> Case:
    sizes, device, dtype, back = place
    q, k = (
        draw(1, T, n, sizes.head_dim, device=device, dtype=dtype, seed=n) for n in (sizes.heads, sizes.kv_heads)
    )  # fmt: skip
    positions = (torch.arange(T, device=device) % sizes.mean_document)[None]
    angle = torch.arange(T, device=device)[:, None] * 1e4 ** -torch.linspace(0, 1, sizes.head_dim // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    ways: dict[str, Callable[..., Result]] = {
        "ours": lambda q, k: rope_qk(q, k, cos, sin, positions, backend=back),
        "plain": lambda q, k: (rope_reference(q, cos, sin, positions), rope_reference(k, cos, sin, positions)),
    }
    return Case(name, T, (q, k), ways, bytes=2 * (q.nbytes + k.nbytes))


def swiglu_case(name: str, T: int, place: Place) -> Case:
    like = {"device": place.device, "dtype": place.dtype}
    gate, up = (draw(T, place.sizes.ffn_dim, **like, seed=i) for i in range(2))
    ways: dict[str, Callable[..., Result]] = {
        "ours": lambda g, u: (swiglu(g, u, backend=place.back),),
        "plain": lambda g, u: (F.silu(g) * u,),
    }
    return Case(name, T, (gate, up), ways, bytes=3 * gate.nbytes)


def cross_entropy_case(name: str, T: int, place: Place) -> Case:
    sizes, device, dtype, back = place
    hidden = draw(T, sizes.dim, device=device, dtype=dtype)
    weight = draw(sizes.vocab, sizes.dim, device=device, dtype=dtype, seed=1) * sizes.dim**-0.5
    labels = torch.arange(T, device=device) * 7919 % sizes.vocab
    labels[::7] = -100
    tiles = {"chunk_tokens": 8192, "chunk_vocab": max(sizes.vocab // 8, 1)}
    ours = partial(linear_cross_entropy, reduction="mean", backend=back)
    ways: dict[str, Callable[..., Result]] = {
        "ours": lambda h, w: (ours(h, w, labels),),
        "ours, tiles": lambda h, w: (ours(h, w, labels, **tiles),),
        "torch chunked": lambda h, w: (
            F.linear_cross_entropy(h, w, labels, options=torch.nn.LinearCrossEntropyOptions()),
        ),
        "plain": lambda h, w: (F.cross_entropy((h @ w.mT).to(torch.promote_types(h.dtype, torch.float32)), labels),),
    }
    flop = 2.0 * T * sizes.dim * sizes.vocab
    return Case(name, T, (hidden, weight), ways, flop=flop, bytes=weight.nbytes, repeats=False)


def adamw_case(name: str, T: int, place: Place) -> Case:
    """A shard of T x dim parameters in eight tensors; in place, so no way is compared with another's result."""
    grads = shard(T, place)
    params, means, squares = ([scale * x for x in grads] for scale in (1.0, 0.1, 0.01))
    owned = [x.clone().requires_grad_() for x in grads]
    squares = [x.abs() for x in squares]
    for parameter, grad in zip(owned, grads):
        parameter.grad = grad

    def ours() -> Result:
        adamw_(params, grads, means, squares, step=10, lr=1e-3, backend=place.back)
        return (params[0],)

    ways: dict[str, Callable[..., Result]] = {"ours": ours}
    for kind in ("fused", "foreach"):
        ways[f"torch {kind}"] = partial(torch_step, torch.optim.AdamW(owned, lr=1e-3, **{kind: True}))
    return Case(name, T, (), ways, bytes=7 * sum(x.nbytes for x in grads), exact="", trains=False)


def torch_step(optimizer: torch.optim.Optimizer) -> Result:
    optimizer.step()
    return ()


def global_norm_case(name: str, T: int, place: Place) -> Case:
    tensors = shard(T, place)
    ways: dict[str, Callable[..., Result]] = {
        "ours": lambda *xs: (global_norm(xs, backend=place.back),),
        "plain": lambda *xs: (torch.nn.utils.get_total_norm(xs),),
    }
    return Case(name, T, tuple(tensors), ways, bytes=sum(x.nbytes for x in tensors), trains=False)


def shard(T: int, place: Place) -> list[Tensor]:
    """T x dim fp32 numbers in eight tensors."""
    count = T * place.sizes.dim // 8
    return [draw(count, device=place.device, dtype=torch.float32, seed=i) for i in range(8)]


class Op(NamedTuple):
    """How an op's case is made, and its ways in the order they are timed in."""

    make: Callable[[str, int, Place], Case]
    ways: tuple[str, ...]


OPS: dict[str, Op] = {
    CAUSAL: Op(attention_case, ("ours", "sdpa flash", "sdpa cudnn", "flex", "plain")),
    DOCUMENTS: Op(attention_case, ("ours", "torch varlen", "flex", "plain")),
    "linear cross-entropy": Op(cross_entropy_case, ("ours", "ours, tiles", "torch chunked", "plain")),
    "rms_norm": Op(norm_case, ("ours", "plain")),
    "add + rms_norm": Op(norm_case, ("ours", "plain")),
    "rope": Op(rope_case, ("ours", "plain")),
    "swiglu": Op(swiglu_case, ("ours", "plain")),
    "adamw": Op(adamw_case, ("ours", "torch fused", "torch foreach")),
    "global norm": Op(global_norm_case, ("ours", "plain")),
}


def make_case(op: str, T: int, place: Place) -> Case:
    return OPS[op].make(op, T, place)
