"""Dense float64 attention, written from the definition, and PyTorch's own at the dtype of the kernels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from error_bound import Error, assert_as_good
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported, which the next line does

from megastage.kernels.flash_attention import attention  # noqa: E402


@dataclass(frozen=True)
class Case:
    B: int = 1
    T: int = 64
    S: int = 64
    H: int = 2
    K: int = 1
    D: int = 16
    cu: tuple[tuple[int, ...], ...] | None = None
    causal: bool = True
    q_offset: int = 0
    window: int | None = None
    softcap: float | None = None
    sink: bool = False
    scale: float | None = None
    seed: int = 0

    def options(self) -> dict:
        names = ("causal", "q_offset", "window", "softcap", "scale")
        return {name: getattr(self, name) for name in names}

    def cu_seqlens(self) -> Tensor | None:
        return None if self.cu is None else torch.tensor(self.cu, dtype=torch.int32, device=DEVICE)

    def mask(self) -> Tensor:
        """bool [B, T, S], pair by pair from the words of the contract."""
        seen = torch.ones(self.B, self.T, self.S, dtype=torch.bool)
        p = torch.arange(self.T)[:, None] + self.q_offset
        j = torch.arange(self.S)[None, :]
        if self.causal:
            seen &= j <= p
        if self.window:
            seen &= (p - j).abs() < self.window
        if self.cu is not None:
            for b, bounds in enumerate(self.cu):
                own = torch.zeros(self.T, self.S, dtype=torch.bool)
                for start, end in pairwise(bounds):
                    own |= (p >= start) & (p < end) & (j >= start) & (j < end)
                seen[b] &= own
        return seen.to(DEVICE)

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.seed)
        shapes = {"q": (self.B, self.T, self.H, self.D), "k": (self.B, self.S, self.K, self.D)}
        shapes["v"] = shapes["k"]
        if self.sink:
            shapes["sink"] = (self.H,)
        return {n: torch.randn(s, generator=g, dtype=torch.float64).to(DEVICE, dtype) for n, s in shapes.items()}

    def cotangents(self) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(self.seed + 1)
        dout = torch.randn(self.B, self.T, self.H, self.D, generator=g, dtype=torch.float64)
        return dout.to(DEVICE), torch.randn(self.B, self.H, self.T, generator=g, dtype=torch.float64).to(DEVICE)


def dense(case: Case, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) by materialised softmax in the dtype of the inputs; lse is -inf for queries without keys."""
    q, k, v = (inputs[n] for n in "qkv")
    scale = case.D**-0.5 if case.scale is None else case.scale
    k, v = (x.repeat_interleave(case.H // case.K, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    mask = case.mask()[:, None]
    sees = mask.any(-1, keepdim=True)
    scores = torch.where(mask, scores, -torch.inf)
    if case.sink:
        column = inputs["sink"][None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    scores = torch.where(sees, scores, 0.0)
    p = torch.where(sees, torch.softmax(scores, -1), 0.0)[..., : case.S]
    out = torch.einsum("bhts,bshd->bthd", p, v)
    return out, torch.where(sees[..., 0], scores.logsumexp(-1), -torch.inf)


def builtin(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """F.scaled_dot_product_attention with a dense mask: PyTorch's own tiled attention, without cap and sink."""
    q, k, v = (inputs[n].transpose(1, 2) for n in "qkv")
    k, v = (x.repeat_interleave(case.H // case.K, 1) for x in (k, v))
    mask = case.mask()[:, None]
    sees = mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~sees, scale=case.scale)
    return torch.where(sees, out, 0.0).transpose(1, 2)


def results(inputs: dict[str, Tensor], run, dout: Tensor, dlse: Tensor | None) -> dict[str, Tensor]:
    """Outputs and gradients of run(inputs) under fixed cotangents."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
    out, lse = run(leaves)
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + (torch.where(torch.isfinite(lse), lse, 0.0) * dlse.to(lse.dtype)).sum()
    loss.backward()
    found = {"out": out.detach(), "lse": lse.detach()}
    return found | {f"d{n}": x.grad for n, x in leaves.items() if x.grad is not None}


def run_backend(case: Case, backend: str):
    def run(x: dict[str, Tensor]):
        return attention(
            x["q"], x["k"], x["v"], case.cu_seqlens(),
            sink_H=x.get("sink"), return_lse=True, backend=backend, **case.options(),
        )  # fmt: skip

    return run


def has_builtin(case: Case) -> bool:
    return not case.softcap and not case.sink


def three_ways(case: Case, dtype: torch.dtype, backend: str) -> tuple[dict[str, Tensor], ...]:
    """(ours, PyTorch's, exact): results and gradients from the same rounded inputs.

    PyTorch's op is F.scaled_dot_product_attention where there are no softcap and sink, else the dense softmax. At 16
    bit the former is the stricter one; it gives no lse, which is held to the dense one's. At fp32 the dense softmax is
    stricter, since it keeps its probabilities: kernels are held to it, with a gradient of lse; the CPU path, which is
    PyTorch's tiled kernel itself, to the larger error of the two.
    """
    inputs = case.inputs(dtype)
    wide = {n: x.double() for n, x in inputs.items()}
    dout, dlse = (x.to(dtype) for x in case.cotangents())

    def exactly(dlse: Tensor | None) -> dict[str, Tensor]:
        return results(wide, lambda x: dense(case, x), dout.double(), None if dlse is None else dlse.double())

    if dtype != torch.float32 and has_builtin(case):
        ours, exact = results(inputs, run_backend(case, backend), dout, None), exactly(None)
        lse = dense(case, inputs)[1]
        return ours, results(inputs, lambda x: (builtin(case, x), lse), dout, None), exact
    ours, exact = results(inputs, run_backend(case, backend), dout, dlse), exactly(dlse)
    theirs = results(inputs, lambda x: dense(case, x), dout, dlse)
    if has_builtin(case) and backend == "torch":
        plain, plain_exact = results(inputs, lambda x: (builtin(case, x), exact["lse"]), dout, None), exactly(None)
        for name, true in exact.items():
            error = plain[name].double() - plain_exact[name]
            if name != "lse" and error.abs().max() > (theirs[name].double() - true).abs().max():
                theirs[name] = true + error
    return ours, theirs, exact


def noise_of_lone_queries(case: Case, inputs: dict[str, Tensor]) -> float:
    """What dq and dk may be at 16 bit where every query sees at most one key and they are 0.

    They are differences of equal terms, formed in fp32: 2 ulp of that, times the factor. (At fp32 kernels know them.)
    """
    q, k, v = (float(inputs[n].double().norm(dim=-1).max()) for n in "qkv")
    dout = float(case.cotangents()[0].norm(dim=-1).max())
    return 2 * torch.finfo(torch.float32).eps * dout * v * max(q, k) * (case.scale or case.D**-0.5)


def held_ways(case: Case, dtype: torch.dtype, backend: str) -> tuple[dict[str, Tensor], ...]:
    """`three_ways`, but for the gradients that `noise_of_lone_queries` bounds, which are asserted here."""
    ways = three_ways(case, dtype, backend)
    if dtype != torch.float32 and has_builtin(case) and case.mask().sum(-1).max() <= 1:
        most = noise_of_lone_queries(case, case.inputs(dtype))
        for name in ("dq", "dk"):
            ours = [way.pop(name) for way in ways][0]  # noqa: RUF015 - all are taken out
            assert ours.abs().max() <= most, f"{name} should be 0 but for rounding: {ours.abs().max()} > {most}"
    return ways


def check(case: Case, dtype: torch.dtype, backend: str) -> dict[str, Error]:
    """Hold every output and gradient to the bar; returns the errors."""
    return assert_as_good(*held_ways(case, dtype, backend))
