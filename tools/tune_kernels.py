#!/usr/bin/env python3
"""Measure launch settings of the kernels on this GPU and write what beats the shipped ones to kernels/tuning/.

    python tools/tune_kernels.py                      every op, bf16; prints, writes nothing (half an hour: most of it
                                                      compiles attention; --op attention_forward is a part)
    python tools/tune_kernels.py --write              and writes the entries of this architecture and Triton version
    TRITON_INTERPRET=1 python tools/tune_kernels.py --dry-run --write --folder DIR     toy sizes on the CPU

A candidate counts only if its results equal the default's to rounding. Nothing is tuned during training: the tables
are data, and `python tools/kernel_gate.py` compiles every entry for the architecture that it names.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

GAIN = 0.97  # a candidate must take at most this share of the default's time to be worth an entry
Work = Callable[[], "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Subject:
    """One op at one size: `work` launches it, `grid` holds the values to try for each setting, `allows` says which
    combinations make sense."""

    op: str
    dim: int
    work: Work
    grid: dict[str, tuple[int, ...]]
    allows: Callable[[dict[str, int]], bool] = lambda config: True

    def candidates(self) -> Iterator[dict[str, int]]:
        for values in product(*self.grid.values()):
            config = dict(zip(self.grid, values))
            if self.allows(config):
                yield config


def subjects(device: torch.device, dtype: torch.dtype, toy: bool) -> Iterator[Subject]:
    """What is tuned, at the sizes of models from 1 to 70 billion parameters (or toy sizes)."""
    yield from pointwise(device, dtype, toy)
    yield from attention(device, dtype, toy)
    yield from flat(device, dtype, toy)


def attention(device: torch.device, dtype: torch.dtype, toy: bool) -> Iterator[Subject]:
    """Packed documents of 2048 tokens, four query heads a group. dq and dkv are timed inside the whole backward."""
    from megastage.kernels import _attention_launch as launch
    from megastage.kernels._attention_reference import Geometry
    from megastage.kernels._attention_tuning import architecture, key_kernels

    tokens, heads, groups = (48, 4, 2) if toy else (8192, 32, 4)
    cu_seqlens = torch.arange(0, tokens + 1, tokens // 4, dtype=torch.int32, device=device)[None]
    arch = architecture(device.type, device.index)
    has_tma = arch in ("sm_90", "sm_100")
    grid = {
        "block_m": (16, 32) if toy else (32, 64, 128), "block_n": (16, 32) if toy else (32, 64, 128),
        "cut": (16,) if toy else (16, 32, 64, 128), "num_warps": (4,) if toy else (4, 8),
        "num_stages": (1,) if toy else (2, 3),
    }  # fmt: skip
    for D in (16,) if toy else (64, 128, 256):
        shape = {"device": device, "dtype": dtype}
        q = torch.randn(1, tokens, heads, D, **shape)
        k, v = (torch.randn(1, tokens, heads // groups, D, **shape) for _ in range(2))
        geometry = Geometry(True, D**-0.5, 0, 0, 0.0)
        args = (cu_seqlens, None, geometry)
        out, lse, stats = launch.forward(q, k, v, *args)
        works: dict[str, Work] = {
            "forward": lambda q=q, k=k, v=v, args=args: launch.forward(q, k, v, *args),
            "backward": lambda x=(out, None, q, k, v, out, lse, stats), args=args: launch.backward(*x, *args),
        }
        by_keys = key_kernels(arch, dtype, launch.padded(D))
        for kernel in ("forward", "dq", *by_keys):
            streamed = "block_m" if kernel in by_keys else "block_n"
            fits = lambda config, streamed=streamed: config["cut"] <= config[streamed] <= 4 * config["cut"]
            tma = (0, 1) if has_tma and kernel in by_keys else (int(has_tma),)
            work = works["forward" if kernel == "forward" else "backward"]
            yield Subject(f"attention_{kernel}", D, work, {**grid, "tma": tma}, fits)


def flat(device: torch.device, dtype: torch.dtype, toy: bool) -> Iterator[Subject]:
    """The optimizer and the global norm over one shard; bf16 parameters with bf16 states."""
    from megastage.kernels import global_norm_triton, optimizer_triton

    count = 4096 if toy else 2**26
    param, grad, mean, square = (torch.rand(count, device=device).to(dtype) for _ in range(4))
    scalars = (0.0, 1.0, 0.0, 1.0, 0.0, 1e-8, 1.0)  # a step that changes nothing: every repetition sees the same
    grid = {"block": (512, 1024, 2048, 4096), "num_warps": (2, 4) if toy else (2, 4, 8, 16)}

    def step() -> Tensor:
        optimizer_triton.step_([param], [grad], [mean], [square], None, scalars, False, 0)
        return param

    yield Subject("adamw", 0, step, grid)
    norm = lambda: global_norm_triton.partial_sums([param]).sum()[None]
    yield Subject("global_norm", 0, norm, {**grid, "block": (2048, 4096, 8192, 16384)})


def pointwise(device: torch.device, dtype: torch.dtype, toy: bool) -> Iterator[Subject]:
    from megastage.kernels import cross_entropy_triton, rms_norm_triton, swiglu_triton
    from megastage.kernels.linear_cross_entropy import Rows
    from megastage.kernels.rope import rope_qk_op

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(kind)

    tokens = 8 if toy else 8192
    warps = (1, 2) if toy else (1, 2, 4, 8, 16)
    for D in (16, 24) if toy else (64, 128, 2048, 4096, 8192):
        rows = tokens * (4096 // D if D <= 128 and not toy else 1)
        x, weight = draw(rows, D), draw(D)
        out = rms_norm_triton.forward(x, None, weight, 1e-5)
        grid = {"rows": (1, 2, 4, 8, 16), "num_warps": warps}
        yield Subject("rms_norm", D, lambda x=x, w=weight: rms_norm_triton.forward(x, x, w, 1e-5)[:2], grid)
        yield Subject(
            "rms_norm_backward", D, lambda x=x, w=weight, r=out[2]: rms_norm_triton.backward(x, x, x, w, r), grid
        )
    for D in (16,) if toy else (64, 128):
        q, k, angle = draw(1, tokens, 32, D), draw(1, tokens, 8, D), draw(tokens, D // 2, kind=torch.float32)
        positions = torch.arange(tokens, device=device)[None]
        args = (q, k, angle.cos(), angle.sin(), positions, False)
        yield Subject("rope", D, lambda args=args: rope_qk_op(*args), {"heads": (4, 8, 16, 32), "num_warps": warps})
    for F in (96,) if toy else (5632, 14336, 28672):
        gate, up = draw(tokens, F), draw(tokens, F)
        grid = {"block": (512, 1024, 2048, 4096), "num_warps": warps}
        yield Subject("swiglu", F, lambda g=gate, u=up: swiglu_triton.forward(g, u), grid)
        yield Subject("swiglu_backward", F, lambda g=gate, u=up: swiglu_triton.backward(g, g, u), grid)
    W = 200 if toy else 131072
    logits = draw(min(tokens, 1024), W, kind=torch.float32)
    labels = torch.zeros(logits.shape[0], dtype=torch.int64, device=device)
    grid = {"block": (1024, 2048, 4096, 8192), "num_warps": warps}
    peak, sums = cross_entropy_triton.tile_statistics(logits, labels, 0)
    stats = Rows(peak, 1 / sums[:, 0], torch.zeros_like(peak))
    yield Subject("cross_entropy_statistics", W, lambda: cross_entropy_triton.tile_statistics(logits, labels, 0), grid)
    # bf16 output, so that the logits are not overwritten from one repetition to the next
    yield Subject(
        "cross_entropy_gradient", W,
        lambda: cross_entropy_triton.tile_gradient(logits, labels, 0, stats, torch.bfloat16), grid,
    )  # fmt: skip


def time_ms(work: Work, device: torch.device) -> float:
    """Best of several medians would flatter; the median of 20 calls it is."""
    work()
    times = []
    wait = getattr(torch.cuda, "_sleep", lambda cycles: None)
    for _ in range(20 if device.type == "cuda" else 1):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            wait(2_000_000)  # about a millisecond, in which the host prepares the launch
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            work()
            times.append((time.perf_counter() - begin) * 1e3)
    return sorted(times)[len(times) // 2]


def same(a: Any, b: Any) -> bool:
    pairs = zip(a, b) if isinstance(a, tuple) else ((a, b),)
    return all(torch.allclose(x.float(), y.float(), rtol=2e-2, atol=1e-3) for x, y in pairs)


def tune(subject: Subject, timer: Callable[[Work], float]) -> tuple[dict[str, int] | None, float, float]:
    """(settings worth an entry or None, the default's ms, the best ms)."""
    from triton.errors import TritonError

    from megastage.kernels.tuning import table

    expected, default_ms = subject.work(), timer(subject.work)
    best, best_ms = None, default_ms
    for config in subject.candidates():
        with table.forced(subject.op, config):
            try:
                if not same(expected, subject.work()):
                    continue
                took_ms = timer(subject.work)
            except (RuntimeError, ValueError, TritonError):  # more registers or shared memory than the chip has
                continue
        if took_ms < best_ms:
            best, best_ms = config, took_ms
    return (best if best_ms <= GAIN * default_ms else None), default_ms, best_ms


def merge(folder: Path, op: str, new: Sequence[dict[str, Any]]) -> None:
    """Replace the entries of the same architecture, Triton version and dtype; keep all others."""
    path = folder / f"{op}.json"
    key = lambda entry: (entry["arch"], entry["triton"], entry["dtype"])
    kept = [e for e in json.loads(path.read_text()) if key(e) not in {key(n) for n in new}] if path.exists() else []
    entries = sorted([*kept, *new], key=lambda e: (*key(e), e["dim"]))
    if entries:
        path.write_text("[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in entries) + "\n]\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="", help="only ops whose name contains this")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--write", action="store_true", help="write the tables")
    parser.add_argument("--folder", help="where the tables are; default kernels/tuning")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() and not options.dry_run:
        parser.error("no CUDA device: only --dry-run works here")
    from megastage.kernels._attention_tuning import architecture as attention_architecture
    from megastage.kernels.dispatch import architecture
    from megastage.kernels.launch import TRITON_MINOR
    from megastage.kernels.tuning import table

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = next(kind for kind, name in table.DTYPE_NAMES.items() if name == options.dtype)
    folder = Path(options.folder) if options.folder else table.FOLDER
    if options.write:
        folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for subject in subjects(device, dtype, options.dry_run):
        if options.op not in subject.op:
            continue
        config, default_ms, best_ms = tune(subject, lambda work: time_ms(work, device))
        print(f"{subject.op} {subject.dim}: default {default_ms:.4f} ms, best {best_ms:.4f} ms, {config or 'default'}")
        kind = "fp32" if subject.op.startswith("cross_entropy") else options.dtype
        arch = attention_architecture(device.type, None) if subject.op.startswith("att") else architecture(device)
        entry = {"arch": arch, "triton": TRITON_MINOR, "dtype": kind, "dim": subject.dim}
        if config:
            found.setdefault(subject.op, []).append({**entry, "config": config})
            if options.write:  # at once: a candidate that takes the GPU down takes nothing that was found before
                merge(folder, subject.op, found[subject.op])
    if options.write:
        print(f"wrote {sum(map(len, found.values()))} entries to {folder}; now run tools/kernel_gate.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
