#!/usr/bin/env python3
"""Every kernel on a GPU: first correctness in bf16, then time against PyTorch's ways of doing the same.

    python benchmarks/gpu.py                          1k to 128k tokens, within 8.5 minutes; gpu.json and gpu.png
    python benchmarks/gpu.py --check-only             correctness alone
    python benchmarks/gpu.py --plan                   what it would do, in which order, and how long that should take
    TRITON_INTERPRET=1 python benchmarks/gpu.py --dry-run     toy shapes on the CPU: proves the command, not the speed

Correctness: see gpu_judge.py. An op of which any result is wrong is not timed, and the exit status is 1.
Times are medians over repetitions with the second-level cache flushed between them. What does not run here (a back
end that is missing, memory that is not enough) is written down with its reason, not left out: so at 32k tokens the
plain form of attention, whose scores alone are 64 GiB.

Time: what matters most comes first, nothing is begun that is not expected to fit, and the process that does the work
is ended when the minutes are over, whatever it does then. If it dies or gives no answer for two minutes, another goes
on behind what it was doing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from gpu_judge import error_table
from gpu_measure import DTYPES, GPU_LOST, Log, ops_of, plan, work
from gpu_plan import Item
from gpu_plan import table as plan_table
from gpu_report import plot, table

LENGTHS = [2**n for n in range(10, 18)]
REPORT_S = 20.0  # kept for the end of the process, the tables and the plot
LEAST_START_S = 20.0  # a process that has less left is not started: it would do little but import
MOST_STARTS = 40
SILENT_S = 120.0  # no result for so long is a kernel that does not end; compiling flex takes a third of it
POLL_S = 0.5


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="toy shapes; on the CPU with TRITON_INTERPRET=1")
    parser.add_argument("--check-only", action="store_true", help="print the errors and stop after correctness")
    parser.add_argument("--plan", action="store_true", help="print what would be done when, and stop")
    parser.add_argument("--dtype", choices=DTYPES, help="default bf16 on a GPU, fp32 in the dry run")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    parser.add_argument("--ops", default="", help="only ops whose name contains this")
    parser.add_argument("--out", default="outputs/benchmarks", help="folder for gpu.json and gpu.png")
    parser.add_argument("--minutes", type=float, default=8.5, help="end within this time")
    parser.add_argument("--worker-seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() and not (options.dry_run or options.plan):
        parser.error("no CUDA device: only --dry-run and --plan work here")
    if min(options.lengths) < 1:
        parser.error(f"--lengths {min(options.lengths)}: lengths are positive")
    if options.minutes * 60 < REPORT_S + LEAST_START_S:
        parser.error(f"--minutes {options.minutes}: less than {REPORT_S + LEAST_START_S:.0f} s show nothing")
    if options.dry_run:
        options.lengths = [length for length in options.lengths if length <= 128] or [32]
    if not ops_of(options):
        parser.error(f"--ops {options.ops!r} is in no op's name")
    return options


def supervise(
    argv: Sequence[str], log: Log, seconds: float,
    start: Callable[..., Any] = subprocess.Popen, clock: Callable[[], float] = time.monotonic,
) -> None:  # fmt: skip
    """Have the plan worked through by one process after another until it is done or the seconds are over.

    What a process was doing when it died or was ended is noted, so that the next one leaves it out.
    """
    end_s = clock() + seconds
    for _ in range(MOST_STARTS):
        left_s = end_s - clock()
        if left_s < LEAST_START_S:
            return
        worker = start([sys.executable, str(Path(__file__).resolve()), *argv, "--worker-seconds", f"{left_s:.1f}"])
        try:
            why = watch(worker, log, end_s, clock)
        finally:  # also at Ctrl-C
            end(worker)
        if why is None or not note_end(log, why, worker.returncode):
            return


def watch(worker: Any, log: Log, end_s: float, clock: Callable[[], float]) -> str | None:
    """Wait for a process; why it did not finish, or None."""
    size, heard_s = -1, clock()
    while (now_s := clock()) < end_s:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = worker.wait(timeout=max(0.01, min(POLL_S, end_s - now_s)))
            return None if status == 0 else f"its process died (status {status})"
        if (found := log.size()) != size:
            size, heard_s = found, clock()
        elif clock() - heard_s > SILENT_S:
            return f"it was ended: no answer for {SILENT_S:.0f} s"
    return "it was ended: out of time (--minutes)"


def end(worker: Any) -> None:
    """A process that waits for a hung GPU may not die at once; it is not waited for."""
    worker.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(timeout=5)


def note_end(log: Log, why: str, status: int | None) -> bool:
    """Write down what a process was doing at its end; False if it had done nothing since the last one's end."""
    events = log.events()
    last = events[-1] if events else {"event": "none"}
    if last["event"] == "begin":
        op, length, way = last["key"].split("|")
        if way:
            row = {"op": op, "length": int(length), "way": way, "did_not_run": why}
            log.write("time", key=last["key"], row=row)
        else:
            log.write("check", key=last["key"], rows=[], problems=[f"{op}, {length} tokens: {why}"])
        return True
    log.write("ended", why=why)
    return status == GPU_LOST or last["event"] in ("check", "time")


def collect(items: Sequence[Item], log: Log) -> dict[str, Any]:
    """What gpu.json holds: facts, the errors of every check, what is wrong, and a row for every way of the plan."""
    events = log.events()
    checked = {e["key"]: e for e in events if e["event"] == "check"}
    timed = {e["key"]: e["row"] for e in events if e["event"] == "time"}
    found: dict[str, Any] = {}
    for event in events:
        if event["event"] == "facts":
            found = {key: value for key, value in event.items() if key != "event"}
    problems = [problem for event in checked.values() for problem in event["problems"]]
    problems += [f"{i.op}, {i.length} tokens: not checked" for i in items if not i.way and i.key not in checked]
    late = {"did_not_run": "out of time (--minutes)"}
    rows = [timed.get(i.key, {"op": i.op, "length": i.length, "way": i.way, **late}) for i in items if i.way]
    return {**found, "errors": [r for e in checked.values() for r in e["rows"]], "problems": problems, "rows": rows}


def report(options: argparse.Namespace, items: Sequence[Item], log: Log, out: Path) -> int:
    """Print and write the results; the exit status."""
    found = collect(items, log)
    (out / "gpu.json").write_text(json.dumps(found, indent=1))
    name = found.get("device", "no device")
    print(", ".join(f"{key} {found[key]}" for key in ("device", "arch", "torch", "triton", "dtype") if key in found))
    print(error_table(found["errors"]))
    checked = sum(not item.way for item in items)
    print(f"correctness: {checked} cases, {len(found['problems'])} problems", *found["problems"], sep="\n  ")
    rows = found["rows"]
    if rows:
        print(table(rows))
        late = sum(row.get("did_not_run", "").startswith("out of time") for row in rows)
        print(f"{len(rows) - late} of {len(rows)} rows within {options.minutes} minutes")
        try:
            plot(rows, out / "gpu.png", f"{name}: forward + backward")
        except ImportError:
            print("no plot: matplotlib is not installed (pip install megastage[plot])")
    print(f"wrote {out}/gpu.json", flush=True)
    broken = [r for r in rows if r["way"].startswith("ours") and not r.get("did_not_run", "out").startswith("out")]
    return 1 if found["problems"] or broken else 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    items = plan(options)
    if options.plan:
        print(plan_table(items, options.minutes - REPORT_S / 60))
        return 0
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "gpu.jsonl")
    if options.worker_seconds is not None:
        work(options, log, options.worker_seconds)
        return 0
    log.path.unlink(missing_ok=True)
    try:
        supervise(argv, log, 60 * options.minutes - REPORT_S)
    except KeyboardInterrupt:
        print("interrupted: what was done follows")
    return report(options, items, log, out)


if __name__ == "__main__":
    sys.exit(main())
