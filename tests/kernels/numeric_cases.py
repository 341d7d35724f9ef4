"""What the ops but attention are tried with: our op, PyTorch's, the same in float64, over a grid of shapes.

PyTorch's side is the form that keeps most digits where there are several: rotary embedding and cross-entropy in fp32
for 16-bit inputs. tests/kernels/test_kernel_numerics.py holds the grid to the bar; benchmarks/numerics.py prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megastage.kernels.global_norm import global_norm
from megastage.kernels.linear_cross_entropy import linear_cross_entropy
from megastage.kernels.optimizer import adamw_
from megastage.kernels.rms_norm import add_rms_norm, rms_norm
from megastage.kernels.rope import rope_qk
from megastage.kernels.swiglu import swiglu

Way = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """inputs: by name, float64. outputs: names; grads: a cotangent for each, none where the op has no backward.

    ours takes the inputs and `backend`; torchs the inputs, also in float64, where it is the exact result.
    """

    op: str
    shape: str
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    grads: tuple[Tensor, ...]
    ours: Way
    torchs: Way

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def results(case: Case, way: Way, dtype: torch.dtype, rounded: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients of `way` at `dtype`, for inputs and cotangents rounded to `rounded` first."""
    leaves = [x.to(rounded).to(dtype).requires_grad_(bool(case.grads)) for x in case.inputs.values()]
    found = way(*leaves)
    found = found if isinstance(found, tuple) else (found,)
    named = dict(zip(case.outputs, (x.detach() for x in found), strict=True))
    if case.grads:
        grads = [g.to(rounded).to(x.dtype) for g, x in zip(case.grads, found)]
        named |= {f"d{n}": g for n, g in zip(case.inputs, torch.autograd.grad(found, leaves, grads))}
    return named


def three_ways(case: Case, dtype: torch.dtype, backend: str) -> tuple[dict[str, Tensor], ...]:
    """(ours, PyTorch's, exact), all from the same rounded inputs."""
    ours = results(case, partial(case.ours, backend=backend), dtype, dtype)
    return ours, results(case, case.torchs, dtype, dtype), results(case, case.torchs, torch.float64, dtype)


def wide(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm_case(shape: tuple[int, ...], eps: float = 1e-5, seed: int = 0) -> Case:
    D = shape[-1]
    inputs = {"x": 3 * noise(*shape, seed=seed), "weight": 1 + noise(D, seed=seed + 1)}
    return Case(
        "rms_norm", _text(shape), inputs, ("out",), (noise(*shape, seed=seed + 2),),
        lambda x, w, backend: rms_norm(x, w, eps, backend=backend), lambda x, w: F.rms_norm(x, (D,), w, eps),
    )  # fmt: skip


def add_norm_case(shape: tuple[int, ...], eps: float = 1e-6, seed: int = 0) -> Case:
    def torchs(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        # the op normalises the sum as it is stored, so the exact one must see it rounded, where it is
        return F.rms_norm(total, shape[-1:], weight, eps), total

    inputs = {"x": noise(*shape, seed=seed), "residual": noise(*shape, seed=seed + 1)}
    inputs["weight"] = noise(shape[-1], seed=seed + 2)
    grads = noise(*shape, seed=seed + 3), noise(*shape, seed=seed + 4)
    ours = lambda *a, backend: add_rms_norm(*a, eps, backend=backend)
    return Case("add + rms_norm", _text(shape), inputs, ("out", "sum"), grads, ours, torchs)


def rope_case(
    B: int, T: int, H: int, K: int, D: int, seed: int = 0, positions: Tensor | None = None,
    tables: tuple[Tensor, Tensor] | None = None,
) -> Case:  # fmt: skip
    """Positions restart every three tokens, as documents of that length do, unless they are given."""
    if positions is None:
        positions = torch.arange(T).repeat(B, 1) % 3
    angles = torch.arange(int(positions.max()) + 1)[:, None] * 10000 ** (-torch.arange(0, D, 2).double() / D)
    cos, sin = tables or (angles.cos().float(), angles.sin().float())

    def turn(x: Tensor) -> Tensor:
        """As a complex product: another road to the same numbers."""
        c, s = (t[positions][:, :, None].to(wide(x).dtype) for t in (cos, sin))
        pairs = torch.complex(*(half.contiguous() for half in wide(x).chunk(2, -1)))
        turned = pairs * torch.complex(c, s)
        return torch.cat((turned.real, turned.imag), -1).to(x.dtype)

    shapes = {"q": (B, T, H, D), "k": (B, T, K, D)}
    return Case(
        "rope", f"{B} x {T} x {H}+{K} x {D}", {n: noise(*s, seed=seed + i) for i, (n, s) in enumerate(shapes.items())},
        ("q'", "k'"), tuple(noise(*s, seed=seed + 2 + i) for i, s in enumerate(shapes.values())),
        lambda q, k, backend: rope_qk(q, k, cos, sin, positions, backend=backend), lambda q, k: (turn(q), turn(k)),
    )  # fmt: skip


def swiglu_case(shape: tuple[int, ...], seed: int = 0) -> Case:
    inputs = {"gate": 6 * noise(*shape, seed=seed), "up": noise(*shape, seed=seed + 1)}
    return Case(
        "swiglu", _text(shape), inputs, ("out",), (noise(*shape, seed=seed + 2),),
        lambda g, u, backend: swiglu(g, u, backend=backend), lambda g, u: F.silu(g) * u,
    )  # fmt: skip


def cross_entropy_case(
    N: int, D: int, V: int, tokens: int = 1024, vocab: int = 0, z_loss: float = 1e-2, reduction: str = "sum",
    seed: int = 0,
) -> Case:  # fmt: skip
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(seed + 5))
    if N > 1:
        labels[N // 2] = -100
    valid = labels != -100

    def torchs(h: Tensor, w: Tensor) -> Tensor:
        # PyTorch's products of the same tiles: BLAS rounds one and the same logit differently in a matrix of other size
        tiles = [torch.cat([x @ y.mT for y in w.split(vocab or V)], 1) for x in h.split(tokens)]
        logits = wide(torch.cat(tiles))
        square = torch.where(valid, logits.logsumexp(-1), 0).square().sum()
        loss = F.cross_entropy(logits, labels, reduction="sum") + z_loss * square
        return loss if reduction == "sum" else loss / valid.sum().clamp(min=1)

    options = {"chunk_tokens": tokens, "chunk_vocab": vocab, "z_loss": z_loss, "reduction": reduction}
    tile = f"tiles {min(tokens, N)} x {min(vocab or V, V)}"
    return Case(
        "linear cross-entropy", f"{N} x {D} x {V}, {tile}, {reduction}, z {z_loss:g}",
        {"hidden": noise(N, D, seed=seed), "weight": noise(V, D, seed=seed + 1)}, ("loss",),
        (torch.ones((), dtype=torch.float64),),
        lambda h, w, backend: linear_cross_entropy(h, w, labels, backend=backend, **options), torchs,
    )  # fmt: skip


def adamw_case(n: int, step: int, seed: int = 0) -> Case:
    """One update in the middle of a run, against torch.optim.AdamW(fused=True) from the same state."""
    options: dict[str, Any] = {"lr": 3e-2, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.3}
    names = ("param", "grad", "mean", "square")

    def ours(*tensors: Tensor, backend: str) -> tuple[Tensor, ...]:
        param, grad, mean, square = (x.clone() for x in tensors)
        adamw_([param], [grad], [mean], [square], step=step, backend=backend, **options)
        return param, mean, square

    def torchs(*tensors: Tensor) -> tuple[Tensor, ...]:
        param, grad, mean, square = (x.clone() for x in tensors)
        optimizer = torch.optim.AdamW([param.requires_grad_()], fused=True, **options)
        state = {"step": torch.tensor(float(step - 1)), "exp_avg": mean, "exp_avg_sq": square}
        optimizer.state[param] = state
        param.grad = grad
        optimizer.step()
        return param.detach(), mean, square

    inputs = {name: noise(n, seed=seed + i) for i, name in enumerate(names)}
    inputs["square"] = inputs["square"].abs() + 1e-3
    return Case("adamw", f"{n}, step {step}", inputs, ("param'", "mean'", "square'"), (), ours, torchs)


def global_norm_case(sizes: tuple[int, ...], seed: int = 0) -> Case:
    inputs = {f"x{i}": noise(n, seed=seed + i) for i, n in enumerate(sizes)}

    def torchs(*xs: Tensor) -> Tensor:
        # foreach_norm, which torch.nn.utils.get_total_norm takes, returns the norm of 16-bit tensors in 16 bit
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x, dtype=wide(x).dtype) for x in xs]))

    ours = lambda *xs, backend: global_norm(xs, backend=backend)
    return Case("global norm", " + ".join(map(str, sizes)), inputs, ("norm",), (), ours, torchs)


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def grid() -> Iterator[Case]:
    """Shapes of 1, primes and non-multiples of every tile; ragged tiles of cross-entropy; both its reductions."""
    for shape in ((1, 1), (1, 128), (7, 1), (3, 5, 96), (13, 257), (2, 1000), (33, 64)):
        yield norm_case(shape)
    for shape in ((1, 1), (3, 5, 96), (19, 130), (5, 1), (2, 1031)):
        yield add_norm_case(shape)
    yield from (rope_case(1, 1, 1, 1, 2), rope_case(2, 7, 6, 3, 20), rope_case(1, 11, 8, 1, 64))
    yield rope_case(1, 3, 33, 17, 80)
    yield rope_case(2, 5, 4, 2, 128, positions=torch.arange(40, 45).repeat(2, 1))  # a context-parallel offset
    for shape in ((1,), (1, 1), (3, 5, 96), (2, 2049), (17, 31)):
        yield swiglu_case(shape)
    for (N, D, V), (tokens, vocab) in product(
        ((1, 1, 1), (13, 16, 37), (9, 32, 131)), ((1024, 0), (5, 0), (1024, 16), (4, 10))
    ):
        yield cross_entropy_case(N, D, V, tokens, vocab)
    yield cross_entropy_case(13, 16, 37, z_loss=0.0, reduction="mean")
    yield cross_entropy_case(13, 16, 37, 5, 10, z_loss=0.0, reduction="mean")
    yield from (adamw_case(1, 1), adamw_case(1025, 3), adamw_case(3001, 1000))
    yield from (global_norm_case((1,)), global_norm_case((5, 8192, 8193, 3)))
