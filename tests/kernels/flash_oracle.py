"""Dense float64 attention, written from the definition, and the error bounds the kernels are held to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
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


def results(inputs: dict[str, Tensor], run, dout: Tensor, dlse: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients of run(inputs) under fixed cotangents."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
    out, lse = run(leaves)
    seen = torch.isfinite(lse)
    loss = (out * dout.to(out.dtype)).sum() + (torch.where(seen, lse, 0.0) * dlse.to(lse.dtype)).sum()
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


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square error per tensor (the largest one is mostly luck); infinities must agree."""
    errors = {}
    for name, exact in truth.items():
        finite = torch.isfinite(exact)
        assert torch.equal(torch.isfinite(found[name]), finite), name
        errors[name] = _rms((found[name].double() - exact)[finite])
    return errors


def bounds(case: Case, dtype: torch.dtype, truth: dict[str, Tensor]) -> dict[str, float]:
    """Per tensor: twice the larger error of PyTorch's two forms at `dtype`, or 2 ulp of its values."""
    inputs = case.inputs(dtype)
    dout, dlse = (x.to(dtype) for x in case.cotangents())
    base = _errors(results(inputs, lambda x: dense(case, x), dout, dlse), truth)
    if not case.softcap and not case.sink:

        def both(x):
            out = builtin(case, x)
            return out, out.new_zeros(())

        wide = {n: x.double() for n, x in inputs.items()}
        nothing = torch.zeros(())
        own = results(inputs, both, dout, nothing)
        for name, error in _errors(own, results(wide, both, dout.double(), nothing)).items():
            base[name] = max(base[name], error)
    limit = {}
    for name, exact in truth.items():
        exact = exact[torch.isfinite(exact)]
        eps = torch.finfo(torch.float32 if name == "lse" else dtype).eps
        # In small cases a few errors decide, and gradients cancel to little from products of size sqrt(D).
        few = exact.numel() < 256 or case.T * case.S < 1024
        floor = case.D**0.5 if few else 0.5
        limit[name] = (4 if few else 2) * max(base[name], eps * max(_rms(exact), floor))
    return limit


def check(case: Case, dtype: torch.dtype, backend: str) -> dict[str, float]:
    """Assert that every output and gradient keeps its bound; returns error / bound."""
    inputs = case.inputs(dtype)
    dout, dlse = (x.to(dtype) for x in case.cotangents())
    wide = {n: x.double() for n, x in inputs.items()}
    truth = results(wide, lambda x: dense(case, x), dout.double(), dlse.double())
    limit = bounds(case, dtype, truth)
    errors = _errors(results(inputs, run_backend(case, backend), dout, dlse), truth)
    for name, error in errors.items():
        assert error <= limit[name], f"{name}: error {error:.3e} > {limit[name]:.3e} for {case}, {dtype}, {backend}"
    return {n: e / limit[n] if limit[n] else 0.0 for n, e in errors.items()}
