#!/usr/bin/env python3
"""The CPU path of linear cross-entropy, RMSNorm and attention against PyTorch's own: time ratios, below 1 is faster.

    python benchmarks/cpu_kernels.py [--repeat 9] [--threads 1]

Shapes are rows x width, rows x width x vocabulary, and for attention tokens x documents (6 query heads on 2 key/value
heads of 64). Ours and theirs alternate, and the best of the repetitions counts, so that a busy machine disturbs both
alike.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megastage.kernels.flash_attention import attention
from megastage.kernels.linear_cross_entropy import linear_cross_entropy
from megastage.kernels.rms_norm import rms_norm

Way = Callable[[], object]
NORM_SHAPES = ((2048, 384), (1024, 4096), (8192, 64), (16, 384))
LOSS_SHAPES = ((2048, 384, 8192), (512, 256, 32768), (64, 256, 32768))


def best_ms(ways: dict[str, Way], repeat: int) -> dict[str, float]:
    """Best time of each way; one uncounted round first."""
    best = dict.fromkeys(ways, float("inf"))
    for number in range(repeat + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                best[name] = min(best[name], (time.perf_counter() - start) * 1e3)
    return best


def norm_ways(N: int, D: int, dtype: torch.dtype) -> dict[str, Way]:
    x, w = torch.randn(N, D, dtype=dtype).requires_grad_(), torch.ones(D, dtype=dtype).requires_grad_()
    grad = torch.randn(N, D, dtype=dtype)
    return {
        "ours": lambda: torch.autograd.grad(rms_norm(x, w), (x, w), grad),
        "F.rms_norm": lambda: torch.autograd.grad(F.rms_norm(x, (D,), w, 1e-5), (x, w), grad),
    }


def cross_entropy_ways(N: int, D: int, V: int, dtype: torch.dtype) -> dict[str, Way]:
    hidden, labels = torch.randn(N, D, dtype=dtype).requires_grad_(), torch.randint(0, V, (N,))
    weight = (torch.randn(V, D) * D**-0.5).to(dtype).requires_grad_()
    leaves = (hidden, weight)
    ways: dict[str, Way] = {
        "ours": lambda: torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), leaves),
        "matmul + F.cross_entropy": lambda: torch.autograd.grad(
            F.cross_entropy((hidden @ weight.mT).float(), labels, reduction="sum"), leaves
        ),
    }
    if fused := getattr(F, "linear_cross_entropy", None):
        ways["F.linear_cross_entropy"] = lambda: torch.autograd.grad(
            fused(hidden, weight, labels, reduction="sum"), leaves
        )
    return ways


def attention_ways(T: int, documents: int, dtype: torch.dtype) -> dict[str, Way]:
    """Causal attention of one row in documents of even length; PyTorch gets a dense mask, or none for one document."""
    heads, kv_heads, D = 6, 2, 64
    q, k, v = (torch.randn(1, T, n, D, dtype=dtype).requires_grad_() for n in (heads, kv_heads, kv_heads))
    grad = torch.randn(1, T, heads, D, dtype=dtype)
    ends = torch.arange(0, T + 1, T // documents, dtype=torch.int32)[None]
    number = torch.arange(T) // (T // documents)
    mask = (number[:, None] == number).tril()
    options = {"is_causal": True} if documents == 1 else {"attn_mask": mask}

    def theirs() -> object:
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, enable_gqa=True, **options)
        return torch.autograd.grad(out, (q, k, v), grad.transpose(1, 2))

    name = "F.scaled_dot_product_attention" + (", dense mask" if documents > 1 else "")
    return {"ours": lambda: torch.autograd.grad(attention(q, k, v, ends), (q, k, v), grad), name: theirs}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; 0: as it is set up")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    print("| op, forward + backward | shape | dtype | against | ours ms | theirs ms | ratio |\n" + "|---" * 7 + "|")
    for dtype in (torch.float32, torch.bfloat16):
        subjects = [("rms_norm", shape, norm_ways(*shape, dtype)) for shape in NORM_SHAPES]
        subjects += [("linear cross-entropy", shape, cross_entropy_ways(*shape, dtype)) for shape in LOSS_SHAPES]
        subjects += [
            ("attention", (2048, documents), attention_ways(2048, documents, dtype)) for documents in (1, 4, 16, 64)
        ]
        for op, shape, ways in subjects:
            times = best_ms(ways, options.repeat)
            ours = times.pop("ours")
            for name, theirs in times.items():
                row = (op, " x ".join(map(str, shape)), str(dtype).removeprefix("torch."), name)
                print(f"| {' | '.join(row)} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
