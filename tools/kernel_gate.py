#!/usr/bin/env python3
"""Compile every shipped kernel for every architecture without a GPU, and fail if one became slow or does not fit.

    python tools/kernel_gate.py --fast                       the quick selection (what the tests run)
    python tools/kernel_gate.py                              everything, other forms of attention included
    python tools/kernel_gate.py --triton DIR                 with another Triton, installed beside the environment by
                                                             `pip install --no-deps --target DIR triton==3.9.0`
    python tools/kernel_gate.py --plain --json A.json        figures of every kernel and head dimension; of two Tritons'
                                                             files tools/kernel_tables.py makes docs/kernels-gate.md
A kernel fails if it does not compile, spills registers (in the tensor loops; anywhere for kernels without), has its
wgmma serialised, feeds a tensor loop by plain loads, loads narrowly, does not fit on a multiprocessor, or misses a bar
of kernel_probe/bars.py. fp32 attention, which is for checks, must compile and fit. Figures of an unchanged source come
from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="only the quick selection")
    parser.add_argument("--plain", action="store_true", help="every kernel and head dimension once, no other forms")
    parser.add_argument(
        "--arch",
        action="append",
        help="sm_80, sm_86, sm_90, sm_100 or gfx942; may be repeated; default all (--fast and --plain: without sm_86)",
    )
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--triton", help="folder of another Triton installation")
    parser.add_argument("--cache", default=str(REPO / ".cache" / "kernel_gate"), help="folder, or 'off'")
    parser.add_argument("--jobs", type=int, default=min(4, len(os.sched_getaffinity(0))))
    parser.add_argument("--json", help="write all figures here")
    options = parser.parse_args(argv)
    if options.triton:
        if not (Path(options.triton) / "triton").is_dir():
            parser.error(f"--triton {options.triton}: no triton package there; make one with pip install --target")
        sys.path.insert(0, options.triton)
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no machine code
    sys.path.insert(0, str(REPO))
    import triton
    from kernel_probe import gate
    from kernel_probe.launches import specs_of
    from kernel_probe.report import table

    from megastage.kernels.registry import ARCHITECTURES, MAIN_ARCHITECTURES, all_cases

    if unknown := set(options.arch or ()) - set(ARCHITECTURES):
        parser.error(f"--arch {', '.join(sorted(unknown))}: choose from {', '.join(ARCHITECTURES)}")
    every = MAIN_ARCHITECTURES if options.fast or options.plain else ARCHITECTURES
    start = time.perf_counter()
    specs = specs_of(all_cases(options.arch or every, fast=options.fast, forms=not options.plain))
    specs = [spec for spec in specs if options.kernel in spec.name]
    if not specs:
        parser.error(f"no kernel has {options.kernel!r} in its name")
    verdicts = gate.run(specs, None if options.cache == "off" else Path(options.cache), options.jobs)
    print(table([verdict.report for verdict in verdicts if verdict.report]))
    failed = [verdict for verdict in verdicts if verdict.problems]
    for verdict in failed:
        print(f"FAILED {verdict.name}: {'; '.join(verdict.problems)}")
    print(
        f"Triton {triton.__version__}: {len(verdicts)} kernels, {len(failed)} failed, "
        f"{sum(verdict.cached for verdict in verdicts)} from the cache, {time.perf_counter() - start:.0f} s"
    )
    if options.json:
        kernels = [verdict.as_dict() for verdict in verdicts]
        Path(options.json).write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
