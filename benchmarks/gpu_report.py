"""Tables and the plot of benchmarks/gpu.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, with our speed-up over each other way (forward + backward where there is one)."""
    lines = [
        "| op | tokens | way | forward ms | fwd+bwd ms | TFLOP/s | GB/s | ours is faster by |",
        "|---|" + "---|" * 7,
    ]
    ours = {(r["op"], r["length"]): r for r in rows if r["way"] == "ours"}
    for row in sorted(rows, key=lambda row: (row["op"], row["length"])):
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
        -(-len(ops) // columns), columns, figsize=(4.2 * columns, 3.4 * -(-len(ops) // columns)), squeeze=False
    )
    panels = axes.flatten()
    for op, panel in zip(ops, panels):
        for way in dict.fromkeys(row["way"] for row in rows if row["op"] == op):
            points = sorted(
                (row["length"], row.get("train_ms", row["forward_ms"]))
                for row in rows
                if (row["op"], row["way"]) == (op, way) and "did_not_run" not in row
            )
            if points:
                panel.plot(*zip(*points), marker="o", markersize=3, label=way, linewidth=2 if way == "ours" else 1)
        panel.set(title=op, xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
        if panel.lines:
            panel.legend(fontsize=7)
    for panel in panels[len(ops) :]:
        panel.set_axis_off()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
