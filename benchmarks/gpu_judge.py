"""Whether a result is right: how benchmarks/gpu.py refuses a wrong kernel.

The plain form in fp32 (fp64 for fp32 inputs) is the truth, the plain form in the inputs' dtype the measure. Two bars:
- element by element, an error is at most twice PyTorch's largest anywhere in the tensor, or 2 ulp of the element;
- in each of up to 64 stretches of the tensor, the root mean square of the errors is at most twice PyTorch's in the same
  stretch, or 2 ulp. The first bar alone would let a late token lose a block of keys: its numbers are as small as the
  errors of the first token's.
And the same call twice gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gpu_cases import Case, draw
from torch import Tensor

STRETCHES, LEAST_STRETCH = 64, 256


def leaves(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().to(dtype or x.dtype).requires_grad_(case.trains) for x in case.inputs]


def results(case: Case, way: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs and, where the op trains, gradients for fixed random output gradients, the same numbers in any dtype."""
    inputs = leaves(case, dtype)
    outputs = case.ways[way](*inputs)
    found = [x.detach() for x in outputs]
    if case.trains:
        like = {"device": case.inputs[0].device, "dtype": case.inputs[0].dtype}
        grads = [draw(*x.shape, **like, seed=97 + i).to(x.dtype) if x.ndim else None for i, x in enumerate(outputs)]
        found += torch.autograd.grad(outputs, inputs, grads)
    return found


def errors(case: Case) -> list[dict[str, Any]]:
    """Per way of ours and result: errors, and which share of what is allowed they take, by element and by stretch."""
    if not case.exact:
        return []
    narrow = all(x.dtype in (torch.bfloat16, torch.float16) for x in case.inputs)
    exact = results(case, case.exact, torch.float32 if narrow else torch.float64)
    theirs = results(case, case.exact)
    rows = []
    for way in (name for name in case.ways if name.startswith("ours")):
        found = results(case, way)
        repeated = results(case, way) if case.repeats else found
        for i, (our, again, their, true) in enumerate(zip(found, repeated, theirs, exact, strict=True)):
            row = {"op": case.op, "way": way, "length": case.length, "result": i}
            # fp32 is for the dry run and the optimizer: there PyTorch's largest error is a matter of luck
            figures = compare(our, their, true, slack=2 if narrow else 8)
            rows.append({**row, **figures, "repeats": torch.equal(our, again)})
    return rows


def compare(our: Tensor, their: Tensor, true: Tensor, slack: float) -> dict[str, float]:
    """Largest errors, and the largest shares of what an element and a stretch may be off by."""
    eps, tiny = torch.finfo(our.dtype).eps, torch.finfo(our.dtype).smallest_normal
    size = max(LEAST_STRETCH, -(-true.numel() // STRETCHES))
    flat = [x.flatten().split(size) for x in (our, their, true)]
    stretches = [(a.to(c.dtype), b.to(c.dtype), c) for a, b, c in zip(*flat) if c.numel()]
    torch_error = max(((b - c).abs().max().item() for _, b, c in stretches), default=0.0)
    error = share = stretch_share = 0.0
    for a, b, c in stretches:
        off = (a - c).abs()
        ulp = eps * c.abs().clamp(min=tiny).log2().floor().exp2()
        error = worse(error, off.max().item())
        share = worse(share, (off / (slack * ulp.clamp(min=torch_error))).max().item())
        rms, torch_rms, scale = (x.square().mean().sqrt().item() for x in (off, b - c, c))
        allowed = slack * max(torch_rms, eps * scale, tiny)
        stretch_share = worse(stretch_share, rms / allowed)
    return {"error": error, "torch_error": torch_error, "share": share, "stretch_share": stretch_share}


def worse(a: float, b: float) -> float:
    """The larger, NaN above all: a NaN of ours must not pass."""
    return b if not b <= a else a


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with the results of one case; empty if nothing is."""
    found = []
    for row in rows:
        what = f"{row['op']} ({row['way']}), {row['length']} tokens, result {row['result']}"
        shares = f"{row['share']:.2f} of what an element may be off, {row['stretch_share']:.2f} of what a stretch may"
        if not max(row["share"], row["stretch_share"]) <= 1 or row["share"] != row["share"]:
            found.append(f"{what}: error {row['error']:.3g}, PyTorch's {row['torch_error']:.3g}: {shares}")
        if not row["repeats"]:
            found.append(f"{what}: the same call gave other bits")
    return found


def error_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: outputs first, then gradients in the order of the inputs."""
    head = "| op | way | tokens | result | our error | PyTorch's error | share, element | share, stretch |"
    lines = [head, "|---|" + "---|" * 7]
    for row in rows:
        figures = f"{row['error']:.2e} | {row['torch_error']:.2e} | {row['share']:.2f} | {row['stretch_share']:.2f}"
        lines.append(f"| {row['op']} | {row['way']} | {row['length']} | {row['result']} | {figures} |")
    return "\n".join(lines)
