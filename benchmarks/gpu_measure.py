"""The part of benchmarks/gpu.py that touches the GPU: one process, which goes through the plan and notes every result.

A process, because a kernel that reads foreign memory takes its CUDA context with it: the next one goes on behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_cases import OPS, TOY, Case, Place, Sizes, make_case
from gpu_checks import check_makers
from gpu_judge import errors, leaves, problems
from gpu_plan import CHECK_LENGTHS, LEAST_S, SLOW_TO_START, Budget, Item, checks, timings

from megastage.kernels.dispatch import architecture, triton_version

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GPU_LOST = 70  # exit status: nothing can run in this process any more
FLUSH_BYTES = 256 * 2**20
HEAD_START_CYCLES = 2_000_000  # of a clock of 1 to 2 GHz


class Log:
    """Events as lines of JSON on disk, so that a process that dies loses nothing but what it was doing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, **fields: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"event": kind, **fields}) + "\n")

    def events(self) -> list[dict[str, Any]]:
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(ValueError):  # a process may die while it writes
                found.append(json.loads(line))
        return found

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def done(self) -> set[str]:
        return {event["key"] for event in self.events() if event["event"] in ("check", "time")}


def place_of(options: argparse.Namespace) -> Place:
    """Asks for nothing that would start CUDA in the supervising process, which needs none of the GPU's memory."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = DTYPES[options.dtype or ("bf16" if on_gpu or options.plan else "fp32")]
    return Place(TOY if options.dry_run else Sizes(), device, dtype)


def plan(options: argparse.Namespace) -> list[Item]:
    """All of it, checks first. The dry run's times mean nothing, so that all of it fits."""
    place = place_of(options)
    lengths = (33,) if options.dry_run else CHECK_LENGTHS
    items = checks(lengths, check_makers(place), options.ops)
    if options.check_only:
        return items
    flex = place.device.type == "cuda" or options.plan
    timed = timings(options.lengths, place.sizes, options.ops, place.dtype.itemsize, flex)
    if options.dry_run:
        timed = [Item(item.op, item.length, item.way) for item in timed]
    return [*items, *timed]


def facts(place: Place) -> dict[str, Any]:
    device = place.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu (interpreter: times mean nothing)"
    versions = {"torch": torch.__version__, "triton": triton_version(), "cuda": torch.version.cuda}
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    return {"device": name, "arch": architecture(device), **versions, "cudnn": cudnn, "dtype": str(place.dtype)}


def work(options: argparse.Namespace, log: Log, seconds: float) -> None:
    """Go through what is not done yet and fits into `seconds`."""
    budget, done, place = Budget(seconds), log.done(), place_of(options)
    if not any(event["event"] == "facts" for event in log.events()):
        log.write("facts", **facts(place))
    makers = check_makers(place)
    made: tuple[tuple[str, int], Case | Exception] | None = None
    for item in (item for item in plan(options) if item.key not in done):
        if item.way and not budget.fits(item):
            continue
        log.write("begin", key=item.key)
        begin_s = budget.clock()
        if item.way:
            if made is None or made[0] != (item.op, item.length):
                made = None  # the old inputs go before the new ones come
                made = ((item.op, item.length), attempt(lambda item=item: make_case(item.op, item.length, place)))
            row = measure(item, made[1], place.device, wrong(log, item))
            log.write("time", key=item.key, row=row)
            told = row.get("did_not_run") or f"{row.get('train_ms', row['forward_ms']):.3g} ms"
        else:
            make = makers.get(item.op) or (lambda item=item: make_case(item.op, item.length, place))
            found = judged(item, make)
            log.write("check", key=item.key, **found)
            told = "; ".join(found["problems"]) or "right"
        took_s = budget.clock() - begin_s
        budget.learn(item, took_s)
        what = f"{item.op}, {item.length} tokens, {item.way}" if item.way else f"{item.op}, checked"
        print(f"{budget.left_s():4.0f} s left: {what}: {told} ({took_s:.1f} s)", flush=True)
        if place.device.type == "cuda" and is_lost(place.device):
            os._exit(GPU_LOST)  # without the destructors, which would wait for the GPU


def attempt(make: Callable[[], Case]) -> Case | Exception:
    """The case, or why it cannot be made: its inputs alone may be too large for this GPU."""
    try:
        return make()
    except Exception as error:
        return error.with_traceback(None)  # which would keep what was made so far


def judged(item: Item, make: Callable[[], Case]) -> dict[str, Any]:
    """Rows of errors, and what is wrong. One op that cannot run must not hide what is wrong with the others."""
    try:
        rows = errors(make())
    except Exception as error:
        return {"rows": [], "problems": [f"{item.op}, {item.length} tokens: {reason(error)}"]}
    return {"rows": rows, "problems": problems(rows)}


def wrong(log: Log, item: Item) -> str:
    """Why a way of ours may not be timed: the first problem of its op, or of a form of it."""
    if not item.way.startswith("ours"):
        return ""
    events = [e for e in log.events() if e["event"] == "check" and e["key"].startswith(item.op)]
    return next((f"wrong: {problem}" for event in events for problem in event["problems"]), "")


def is_lost(device: torch.device) -> bool:
    """Whether an earlier kernel broke the CUDA context (foreign memory, an instruction that is none)."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def repetitions(one_s: float) -> int:
    """How often a call of this length is timed."""
    return 1 if one_s > 1 else min(200, max(3, round(LEAST_S / max(one_s, 1e-6))))


def median_ms(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a call after one that is not counted; one on the CPU.

    The device empties its cache and waits a millisecond while the host prepares the next call, so that kernels and not
    their launch are timed, as long as the launch takes less than that.
    """
    run()
    if device.type != "cuda":
        start_s = time.perf_counter()
        run()
        return (time.perf_counter() - start_s) * 1e3
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    # not documented: without it, short calls show their launch
    wait = getattr(torch.cuda, "_sleep", lambda cycles: None)
    times: list[float] = []
    wanted = 1
    while len(times) < wanted:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        flush.zero_()
        wait(HEAD_START_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        wanted = repetitions(times[0] / 1e3)
    return sorted(times)[len(times) // 2]


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def measure(item: Item, case: Case | Exception, device: torch.device, problem: str = "") -> dict[str, Any]:
    """One row of the results: forward and forward + backward in ms, rates, peak memory (0.25 GiB of it to flush the
    cache); or why it did not run."""
    row: dict[str, Any] = {"op": item.op, "length": item.length, "way": item.way}
    if isinstance(case, Exception):
        return {**row, "did_not_run": reason(case)}
    if problem:
        return {**row, "did_not_run": problem}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        free = torch.cuda.mem_get_info(device)[0]
        if item.scratch_bytes > free:
            sizes = f"{item.scratch_bytes / 2**30:.0f} GiB beside its inputs, {free / 2**30:.0f} GiB are free"
            return {**row, "did_not_run": f"needs about {sizes}"}
    try:
        row |= times(case, item.way, device)
    except Exception as error:  # whatever a back end throws (Triton's errors have no common base) is its result
        row["did_not_run"] = reason(error)
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


def times(case: Case, way: str, device: torch.device) -> dict[str, float]:
    inputs = leaves(case)

    def forward() -> None:
        # what is compiled is compiled once: with its backward
        with torch.set_grad_enabled(way in SLOW_TO_START):
            case.ways[way](*inputs)

    def train() -> None:
        outputs = case.ways[way](*inputs)
        torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])

    row = {"forward_ms": median_ms(forward, device)}
    row["gb_per_s"] = case.bytes / row["forward_ms"] / 1e6
    if case.flop:
        row["forward_tflops"] = case.flop / row["forward_ms"] / 1e9
    if case.trains:
        row["train_ms"] = median_ms(train, device)
        if case.flop:
            row["train_tflops"] = case.flop * (1 + case.backward_flop) / row["train_ms"] / 1e9
    return row


def ops_of(options: argparse.Namespace) -> Sequence[str]:
    return [op for op in (*OPS, *check_makers(place_of(options))) if options.ops in op]
