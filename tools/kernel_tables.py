#!/usr/bin/env python3
"""Tables for the documentation out of what the gate wrote.

pip install --no-deps --target DIR triton==3.9.0
python tools/kernel_gate.py --plain --json A.json
python tools/kernel_gate.py --plain --json B.json --triton DIR
python tools/kernel_tables.py A.json B.json > docs/kernels-gate.md     every plain form
python tools/kernel_tables.py --summary C.json D.json                  a line a kernel, for docs/kernels.md: C.json and
                                                                       D.json of the whole gate, without --plain
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
HEAD = """# Gate table

Every compiled form of every kernel that is launched, for every architecture, without a GPU. Made by

    python tools/kernel_gate.py --plain --json A.json
    pip install --no-deps --target DIR triton==3.9.0
    python tools/kernel_gate.py --plain --json B.json --triton DIR
    python tools/kernel_tables.py A.json B.json > docs/kernels-gate.md

What the gate asks for, and how the figures are counted: [kernels.md](kernels.md#how-they-are-proven). Each case runs
causal, full, windowed, offset and packed-document attention, and all of them launch the same compiled kernel. Without
`--plain` the gate also judges what is not shown here: sm_86, other head dimensions, numbers of heads, lengths and
layouts, softcap, sink, fp16, and that fp32 compiles and fits."""
MAIN_ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
PLAIN_ATTENTION = re.compile(r"bf16 D(64|80|96|128|256)")
NOTES = {
    "attention": "A cell: registers a thread / spill instructions in the tensor loops (whole kernel) / blocks per "
    "multiprocessor / loads of the main loop / non-MMA instructions per kflop / ceiling without overlap. The last two "
    "are not counted for AMD.",
    "others": "A cell: registers a thread / spill instructions / blocks per multiprocessor / widest load.",
}


def main_loop(report: dict[str, Any]) -> dict[str, Any]:
    loops = [loop for loop in report["loops"] if loop["mma"]]
    return max(loops, key=lambda loop: (loop["flop"] or loop["mma"], -loop["total"]), default={})


def cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    report = entry["report"]
    if report is None:
        return "does not compile"
    failed = "**fails** " if entry["problems"] else ""
    loop = main_loop(report)
    figures = [report["registers"], report["spills"], report["ctas_per_sm"], report["loads"]]
    if loop:
        figures[1] = f"{sum(x['local'] for x in report['loops'])} ({report['spills']})"
        figures += [x for x in (loop.get("nontensor_per_kflop"), loop.get("ceil_serial")) if x is not None]
    return failed + " / ".join(map(str, figures))


def groups(entries: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What the page shows: every kernel at every listed size on the main chips."""
    from kernel_probe.launches import TENSOR_KERNELS

    found: dict[str, list[dict[str, Any]]] = {"attention": [], "others": []}
    for entry in entries:
        if entry["arch"] not in MAIN_ARCHITECTURES or (
            entry["kernel"].startswith("attention") and not PLAIN_ATTENTION.fullmatch(entry["case"])
        ):
            continue
        is_main = entry["kernel"] in TENSOR_KERNELS
        found["attention" if is_main else "others"].append(entry)
    return found


def table(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Kernels by architectures."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in entries:
        row = unique(found, f"{entry['kernel']} [{entry['case']}]", entry["arch"])
        found.setdefault(row, {})[entry["arch"]] = entry
    archs = list(dict.fromkeys(entry["arch"] for entry in entries))
    lines = ["| kernel | " + " | ".join(archs) + " |", "|" + "---|" * (1 + len(archs))]
    for name, row in found.items():
        lines.append(f"| {name} | " + " | ".join(cell(row.get(arch)) for arch in archs) + " |")
    return lines


def unique(found: dict[str, dict[str, Any]], name: str, arch: str) -> str:
    """A case may need several forms of one kernel (with and without a gradient of lse): number them."""
    number = 1
    row = name
    while arch in found.get(row, {}):
        number += 1
        row = f"{name} #{number}"
    return row


def bars(files: Sequence[dict[str, Any]]) -> list[str]:
    from kernel_probe.bars import BARS, PLAIN

    lines = ["| kernel | target | bar | " + " | ".join(f"Triton {file['triton']}" for file in files) + " |"]
    lines.append("|" + "---|" * (3 + len(files)))
    for (kernel, arch), (most, least) in BARS.items():
        texts = []
        for file in files:
            for entry in file["kernels"]:
                if (entry["kernel"], entry["arch"], entry["case"]) == (kernel, arch, PLAIN):
                    report, loop = entry["report"], main_loop(entry["report"])
                    tile = f"{report['warps']} warps, {report['stages']} stages, {report['registers']} registers"
                    spills = f"{report['spills']} spills, {report['loads']}"
                    texts.append(f"**{loop['nontensor_per_kflop']}**, {loop['ceil_serial']} ({tile}, {spills})")
        bound = f"<= {most}" + (f", >= {least}" if least else "")
        lines.append(f"| {kernel} | {arch} | {bound} | " + " | ".join(texts) + " |")
    return lines


def summary(files: Sequence[dict[str, Any]]) -> str:
    """The static bars, then a table for each Triton."""
    lines = bars(files)
    for file in files:
        failed = sum(bool(entry["problems"]) for entry in file["kernels"])
        lines += ["", f"Triton {file['triton']}: {len(file['kernels'])} forms, {failed} failed.", ""]
        lines += summary_table(file["kernels"])
    return "\n".join(lines)


def summary_table(entries: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each kernel: over all forms that the gate judged, the worst of every figure."""
    archs = list(dict.fromkeys(entry["arch"] for entry in entries))
    lines = ["| kernel | " + " | ".join(archs) + " |", "|" + "---|" * (1 + len(archs))]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for entry in entries:
        wide = entry["kernel"].startswith("attention") and "fp32" in entry["case"]
        row = found.setdefault(entry["kernel"] + (", fp32" if wide else ""), {})
        row.setdefault(entry["arch"], []).append(entry)
    return lines + [
        f"| {name} | " + " | ".join(worst(row.get(a, [])) for a in archs) + " |" for name, row in found.items()
    ]


def worst(entries: Sequence[dict[str, Any]]) -> str:
    """The summary's cell: forms (failed) / most registers / most spills / fewest blocks a multiprocessor."""
    if not entries:
        return ""
    reports = [entry["report"] for entry in entries if entry["report"]]
    failed = sum(bool(entry["problems"]) for entry in entries)
    loops = [sum(x["local"] for x in r["loops"]) if main_loop(r) else r["spills"] for r in reports]
    figures = (max(r["registers"] for r in reports), max(loops), min(r["ctas_per_sm"] for r in reports))
    return " / ".join((f"{len(entries)} ({failed})", *map(str, figures)))


def page(files: Sequence[dict[str, Any]]) -> str:
    lines = [HEAD, "", "## Static bars", ""]
    lines += ["bf16, head dimension 128: non-MMA instructions per kflop of the main loop, ceiling without overlap.", ""]
    lines += bars(files)
    for file in files:
        failed = sum(bool(entry["problems"]) for entry in file["kernels"])
        for name, entries in groups(file["kernels"]).items():
            lines += ["", f"## Triton {file['triton']}: {name}", ""]
            if name == "attention":
                lines += [f"{len(file['kernels'])} kernels in all, {failed} fail.", ""]
            lines += [NOTES[name], "", *table(entries)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="written by kernel_gate.py --json")
    parser.add_argument("--summary", action="store_true", help="a line a kernel instead of every form")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(REPO))
    files = [json.loads(Path(file).read_text()) for file in options.files]
    print(summary(files) if options.summary else page(files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
