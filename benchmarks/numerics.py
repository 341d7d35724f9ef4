#!/usr/bin/env python3
"""Errors of every op against float64, beside those of PyTorch's own op at the same dtype: the table of docs/kernels.md.

    TRITON_INTERPRET=1 python benchmarks/numerics.py                      the kernels in the interpreter, 2 minutes
    python benchmarks/numerics.py --backend torch                         the CPU path
    TRITON_INTERPRET=1 python benchmarks/numerics.py --op attention --each     every shape of one op

The shapes are those of tests/kernels (numeric_cases.py, flash_cases.py). For each result and gradient the table shows
the shape that comes closest to the bar: an element may be off by twice PyTorch's largest error in that tensor, or by 2
ulp of itself where that is more (error_bound.py), and share is how much of this its worst element takes. Status 1 if
one takes more than 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "kernels"))

import flash_cases
import flash_oracle
import numeric_cases
from error_bound import Error, compare

from megastage.kernels.dispatch import interpreting

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
Found = dict[tuple[str, str, str], Error]  # by op, result and shape


def errors(backend: str, dtype: torch.dtype, only: str) -> Found:
    found: Found = {}
    for case in numeric_cases.grid():
        if only in case.op:
            ours, theirs, exact = numeric_cases.three_ways(case, dtype, backend)
            found |= {(case.op, n, case.shape): compare(ours[n], theirs[n], true) for n, true in exact.items()}
    for shape, case in flash_cases.CASES.items():
        if only in "attention":
            ours, theirs, exact = flash_oracle.held_ways(case, dtype, backend)
            found |= {("attention", n, shape): compare(ours[n], theirs[n], true) for n, true in exact.items()}
    return found


def closest(found: Found, op: str, result: str) -> tuple[str, Error]:
    """The shape that takes most of what is allowed."""
    shapes = {key[2]: error for key, error in found.items() if key[:2] == (op, result)}
    return max(shapes.items(), key=lambda item: item[1].share)


def cells(error: Error) -> str:
    ratio = f"{error.ours / error.torchs:.2f}" if error.torchs else "-"
    return f"{error.ours:.2e} | {error.torchs:.2e} | {ratio} | {error.share:.2f}"


def table(found: dict[str, Found], each: bool) -> str:
    """Markdown: every shape with its name, or one row for each result with both dtypes side by side."""
    columns = "{0} ours | PyTorch | ratio | share"
    if each:
        lines = [f"| op | result | shape | dtype | {columns.format('error:')} |", "|---" * 8 + "|"]
        for dtype, rows in found.items():
            lines += [f"| {' | '.join(key)} | {dtype} | {cells(error)} |" for key, error in rows.items()]
        return "\n".join(lines)
    names = " | ".join(columns.format(f"{dtype}:") for dtype in found)
    lines = [f"| op | result | shapes | {names} |", "|---" * (3 + 4 * len(found)) + "|"]
    for op, result in dict.fromkeys(key[:2] for rows in found.values() for key in rows):
        shapes = max(sum(key[:2] == (op, result) for key in rows) for rows in found.values())
        figures = " | ".join(cells(closest(rows, op, result)[1]) for rows in found.values())
        lines.append(f"| {op} | {result} | {shapes} | {figures} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("triton", "torch"), default="triton")
    parser.add_argument("--op", default="", help="only ops whose name holds this")
    parser.add_argument("--each", action="store_true", help="every shape, not only the one closest to the bar")
    options = parser.parse_args(argv)
    if options.backend == "triton" and not interpreting() and not torch.cuda.is_available():
        parser.error("without a GPU the kernels run only under TRITON_INTERPRET=1 (or take --backend torch)")
    torch.set_num_threads(1)
    found = {name: errors(options.backend, dtype, options.op) for name, dtype in DTYPES.items()}
    largest = max(error.share for rows in found.values() for error in rows.values())
    print(table(found, options.each) + f"\n\nLargest share of what is allowed: {largest:.2f}")
    return int(largest > 1)


if __name__ == "__main__":
    sys.exit(main())
