#!/usr/bin/env python3
"""What a Triton kernel becomes on a GPU that is not there: registers, spills, occupancy, how memory is read, and an
instruction census of its tensor loops with the ceilings that follow from counting (kernel_probe/census.py).

    python tools/static_kernel_probe.py --selftest        a minimal causal attention forward, on sm_80 and sm_90
    python tools/static_kernel_probe.py FILE.py           FILE defines SPECS: dicts of arguments of `probe`
    options: --json OUT, --gate 'KEY<=VALUE' ... (exit status 1 when a bound is missed), for example
        --gate 'spills<=0' --gate 'serialised<=0' --gate 'unpipelined<=0' --gate 'ctas_per_sm>=1'
        --gate 'main.nontensor_per_kflop<=0.5' --gate 'main.ceil_serial>=0.6'

Signatures follow Triton's ahead-of-time notation, "<type>[:16]", where ":16" promises divisibility by 16 (pointers and
strides normally have it at run time; without it loads are neither wide nor pipelined) and ":1" the constant 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernel_probe.compiler import probe
from kernel_probe.report import Report, table

SELF_TEST = ((80, 128, 64, 8, 3), (90, 128, 64, 8, 3), (90, 128, 128, 8, 2))


def self_test_specs() -> list[dict[str, Any]]:
    from kernel_probe.example import causal_forward

    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16:16")
    types |= {"lse_ptr": "*fp32:16", "scale": "fp32", "head_stride": "i32:16", "row_stride": "i32:16", "N": "i32:16"}
    return [
        {
            "name": f"causal_forward {rows}x{columns}",
            "fn": causal_forward,
            "signature": types,
            "constants": {"D": 128, "ROWS": rows, "COLUMNS": columns},
            "arch": f"sm_{sm}",
            "num_warps": warps,
            "num_stages": stages,
        }
        for sm, rows, columns, warps, stages in SELF_TEST
    ]


def load_specs(path: str) -> list[dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("probe_specs", path)
    if spec is None or spec.loader is None or not Path(path).exists():
        raise ValueError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "SPECS"):
        raise ValueError(f"{path} defines no SPECS")
    return module.SPECS


def missed(report: Report, bound: str) -> str | None:
    """What is wrong if the report misses a bound such as "spills<=0"; ValueError for a bound that cannot be read."""
    match = re.fullmatch(r"([\w.]+)(<=|>=)([\d.]+)", bound)
    if not match:
        raise ValueError(f"--gate {bound!r}: write KEY<=NUMBER or KEY>=NUMBER")
    key, sign, limit = match.groups()
    known = (report.main or {}) if key.startswith("main.") else report.as_dict()
    value = known.get(key.removeprefix("main."))
    if value is not None and (value <= float(limit) if sign == "<=" else value >= float(limit)):
        return None
    return f"{report.name} {report.target}: {bound} missed, got {value}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--selftest", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--gate", action="append", default=[])
    options = parser.parse_args(argv)
    if not options.file and not options.selftest:
        parser.error("give a FILE with SPECS, or --selftest")
    specs = load_specs(options.file) if options.file else self_test_specs()
    reports = [probe(**spec) for spec in specs]
    for report in reports:
        print(report.text())
    problems = [p for report in reports for bound in options.gate if (p := missed(report, bound))]
    print("\n" + table(reports), *problems, sep="\n")
    if options.json:
        Path(options.json).write_text(json.dumps([report.as_dict() for report in reports], indent=1))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
