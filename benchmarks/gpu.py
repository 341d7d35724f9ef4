#!/usr/bin/env python3
"""Every kernel on a GPU: first correctness in bf16, then time against PyTorch's ways of doing the same.

    python benchmarks/gpu.py                          1k to 128k tokens, about 8 minutes; gpu.json and gpu.png
    python benchmarks/gpu.py --check-only             correctness alone
    TRITON_INTERPRET=1 python benchmarks/gpu.py --dry-run     toy shapes on the CPU: proves the command, not the speed

Correctness: the error of each result and gradient against the plain form in fp32 is at most twice that of PyTorch's
plain form in bf16 (or 2 ulp of the largest value). A miss ends the run with status 1, before anything is timed.
Times are medians over repetitions with the second-level cache flushed between them. What does not run here (a back
end that is missing, memory that is not enough) is written down with its reason, not left out: so at 32k tokens the
plain form of attention, whose scores alone are 64 GiB.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu_cases import SLOW_TO_START, TOY, Case, Sizes, case_makers
from gpu_checks import check_makers

from megastage.kernels.dispatch import architecture, triton_version

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECK_LENGTHS = (1024, 1536)
CACHE_BYTES = 256 * 2**20
LEAST_S = 0.1  # time each way is given, compilation aside


def leaves(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [x.detach().to(dtype or x.dtype).requires_grad_(case.trains) for x in case.inputs]


def results(case: Case, way: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs and, where the op trains, gradients for fixed pseudo-random output gradients."""
    inputs = leaves(case, dtype)
    outputs = case.ways[way](*inputs)
    found = [x.detach() for x in outputs]
    if case.trains:
        grads = [torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape).to(x.dtype) + 0.5 for x in outputs]
        found += torch.autograd.grad(outputs, inputs, grads)
    return found


def errors(case: Case) -> list[dict[str, Any]]:
    """Per way of ours and result: our largest error, PyTorch's, and the largest that passes."""
    if not case.exact:
        return []
    narrow = all(x.dtype in (torch.bfloat16, torch.float16) for x in case.inputs)
    exact = results(case, case.exact, torch.float32 if narrow else torch.float64)
    theirs = results(case, case.exact)
    rows = []
    for way in (name for name in case.ways if name.startswith("ours")):
        for i, (our, their, true) in enumerate(zip(results(case, way), theirs, exact)):
            error, their_error = ((x.double() - true).abs().max().item() for x in (our, their))
            # fp32 is for the dry run, against fp64: a few ulp either way, and PyTorch's maximum is a matter of luck
            slack = 2 if narrow else 4
            bound = slack * max(their_error, torch.finfo(our.dtype).eps * true.abs().max().item())
            row = {"op": case.op, "way": way, "length": case.length, "result": i, "error": error}
            rows.append({**row, "torch_error": their_error, "bound": bound})
    return rows


def check(case: Case) -> list[str]:
    """What is wrong with our results; empty if nothing is."""
    try:
        rows = errors(case)
    except Exception as error:  # one op that cannot run must not hide what is wrong with the others
        return [f"{case.op}, {case.length} tokens: {reason(error)}"]
    return [
        f"{row['op']} ({row['way']}), {row['length']} tokens, result {row['result']}: error {row['error']:.3g} > "
        f"{row['bound']:.3g}"
        for row in rows
        if not row["error"] <= row["bound"]  # NaN fails
    ]


def error_table(checked: Sequence[Case]) -> str:
    """Markdown: outputs first, then gradients in the order of the inputs."""
    lines = ["| op | way | tokens | result | our error | PyTorch's error | passes up to |", "|---|" + "---|" * 6]
    for row in (row for case in checked for row in errors(case)):
        figures = " | ".join(f"{row[key]:.2e}" for key in ("error", "torch_error", "bound"))
        lines.append(f"| {row['op']} | {row['way']} | {row['length']} | {row['result']} | {figures} |")
    return "\n".join(lines)


def check_cases(options: argparse.Namespace, shapes: tuple[Any, ...]) -> list[Case]:
    """Every op at two lengths, and attention in every form."""
    found = list(cases((33,) if options.dry_run else CHECK_LENGTHS, *shapes))
    return [*found, *(make() for make in check_makers(*shapes))]


def cases(lengths: Sequence[int], sizes: Sizes, device: torch.device, dtype: torch.dtype, back: str) -> Iterator[Case]:
    for length in lengths:
        for make in case_makers(length, sizes, device, dtype, back):
            try:
                made = make()
            except torch.OutOfMemoryError as error:  # the inputs alone are too large for this GPU
                made = absent(make.func.__name__, length, error)
            yield from made if isinstance(made, list) else [made]


def absent(name: str, length: int, error: Exception) -> Case:
    """Stands for cases that could not be made, so that the results say why."""

    def fails() -> tuple[Tensor, ...]:
        raise error

    return Case(name, length, (), {"all": fails}, exact="", trains=False)


def median_ms(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a call after one that is not counted: three calls or LEAST_S of them; one on the CPU.

    The device empties its cache while the host prepares the next call, so that short kernels are timed and not their
    launch, as long as the launch takes less than that.
    """
    run()
    if device.type != "cuda":
        start_s = time.perf_counter()
        run()
        return (time.perf_counter() - start_s) * 1e3
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - begin < LEAST_S and len(times) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def measure(case: Case, way: str, device: torch.device) -> dict[str, Any]:
    """One row of the results: forward and forward + backward in ms, rates, peak memory (0.25 GiB of it to flush the
    cache); or why it did not run."""
    row: dict[str, Any] = {"op": case.op, "length": case.length, "way": way}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        inputs = leaves(case)

        def forward() -> None:
            with torch.no_grad():
                case.ways[way](*inputs)

        def train() -> None:
            outputs = case.ways[way](*inputs)
            torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])

        row["forward_ms"] = median_ms(forward, device)
        row["gb_per_s"] = case.bytes / row["forward_ms"] / 1e6
        if case.flop:
            row["forward_tflops"] = case.flop / row["forward_ms"] / 1e9
        if case.trains:
            row["train_ms"] = median_ms(train, device)
            if case.flop:
                row["train_tflops"] = case.flop * (1 + case.backward_flop) / row["train_ms"] / 1e9
    except Exception as error:  # whatever a back end throws (Triton's errors have no common base) is its result
        row["did_not_run"] = reason(error)
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


def too_late(case: Case, way: str) -> dict[str, Any]:
    return {"op": case.op, "length": case.length, "way": way, "did_not_run": "out of time (--minutes)"}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, with our speed-up over each other way (forward + backward where there is one)."""
    lines = [
        "| op | tokens | way | forward ms | fwd+bwd ms | TFLOP/s | GB/s | ours is faster by |",
        "|---|" + "---|" * 7,
    ]
    ours = {(r["op"], r["length"]): r for r in rows if r["way"] == "ours"}
    for row in rows:
        rate = row.get("train_tflops", row.get("forward_tflops"))
        key = "train_ms" if "train_ms" in row else "forward_ms"
        base = ours.get((row["op"], row["length"]), {}).get(key)
        figures = [row.get("forward_ms"), row.get("train_ms"), rate, row.get("gb_per_s")]
        texts = ["" if x is None else f"{x:.3g}" for x in figures]
        ratio = row.get("did_not_run") or (f"{row[key] / base:.2f}x" if base and row["way"] != "ours" else "")
        lines.append(f"| {row['op']} | {row['length']} | {row['way']} | {' | '.join(texts)} | {ratio} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """One panel an op: time against length, a line a way. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ops = list(dict.fromkeys(row["op"] for row in rows))
    columns = min(4, len(ops))
    figure, axes = plt.subplots(
        -(-len(ops) // columns), columns, figsize=(4.2 * columns, 3.4 * -(-len(ops) // columns))
    )
    panels = axes.flatten() if hasattr(axes, "flatten") else [axes]
    for op, panel in zip(ops, panels):
        for way in dict.fromkeys(row["way"] for row in rows if row["op"] == op):
            points = [
                (row["length"], row.get("train_ms", row.get("forward_ms")))
                for row in rows
                if (row["op"], row["way"]) == (op, way) and "did_not_run" not in row
            ]
            if points:
                panel.plot(*zip(*points), marker="o", markersize=3, label=way, linewidth=2 if way == "ours" else 1)
        panel.set(title=op, xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
        panel.legend(fontsize=7)
    for panel in panels[len(ops) :]:
        panel.set_axis_off()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="toy shapes; on the CPU with TRITON_INTERPRET=1")
    parser.add_argument("--check-only", action="store_true", help="print the errors and stop after correctness")
    parser.add_argument("--dtype", choices=DTYPES, help="default bf16 on a GPU, fp32 in the dry run")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(10, 18)], help="tokens")
    parser.add_argument("--ops", default="", help="only ops whose name contains this")
    parser.add_argument("--out", default="outputs/benchmarks", help="folder for gpu.json and gpu.png")
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing new after this long")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() and not options.dry_run:
        parser.error("no CUDA device: only --dry-run works here")
    if min(options.lengths) < 1:
        parser.error(f"--lengths {min(options.lengths)}: lengths are positive")
    if options.dry_run:
        options.lengths = [length for length in options.lengths if length <= 128] or [32]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    begin = time.perf_counter()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    sizes, dtype = TOY if options.dry_run else Sizes(), DTYPES[options.dtype or ("bf16" if on_gpu else "fp32")]
    shapes = (sizes, device, dtype, "triton")
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu (interpreter: times mean nothing)"
    print(f"{name}, {architecture(device)}, torch {torch.__version__}, triton {triton_version()}, {dtype}")
    checked = [c for c in check_cases(options, shapes) if options.ops in c.op]
    if not checked:
        print(f"--ops {options.ops!r} is in no op's name")
        return 2
    problems = [problem for case in checked for problem in check(case)]
    print(f"correctness: {len(checked)} cases, {len(problems)} problems", *problems, sep="\n  ", flush=True)
    if options.check_only:
        print(error_table(checked))
    if problems or options.check_only:
        return 1 if problems else 0
    del checked
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"device": name, "arch": architecture(device), "torch": torch.__version__, "triton": triton_version()}
    rows: list[dict[str, Any]] = []
    # what must be compiled for minutes comes last, and every row is on disk at once: a run cut short keeps the rest
    for late in (False, True):
        for case in cases(sorted(options.lengths), *shapes):
            for way in case.ways if options.ops in case.op else ():
                if (way in SLOW_TO_START) == late:
                    is_over = time.perf_counter() - begin > 60 * options.minutes
                    rows.append(too_late(case, way) if is_over else measure(case, way, device))
                    (out / "gpu.json").write_text(json.dumps({**facts, "dtype": str(dtype), "rows": rows}, indent=1))
    print(table(rows))
    try:
        plot(rows, out / "gpu.png", f"{name}: forward + backward")
    except ImportError:
        print("no plot: matplotlib is not installed (pip install megastage[plot])")
    print(f"wrote {out}/gpu.json in {time.perf_counter() - begin:.0f} s")
    broken = [
        row for row in rows if row["way"].startswith("ours") and not row.get("did_not_run", "out").startswith("out")
    ]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
