"""`python -m tools.plot RUN`: the loss curve of a run with its stages, as a PNG."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")


def read(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl. Raises SystemExit where there are none."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    if not path.exists():
        raise SystemExit(f"{path}: not found; give a run's dump folder or its metrics.jsonl")
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]  # a kill may cut one
    records = [record for record in map(json.loads, lines) if record["loss"] is not None]
    if not records:
        raise SystemExit(f"{path}: holds no losses yet")
    return records


def plot(records: list[dict[str, Any]], output: Path) -> None:
    """Loss above, learning rate below, each stage shaded and named."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 6), height_ratios=[3, 1], sharex=True, layout="constrained")
    steps = [r["step"] for r in records]
    top.plot(steps, [r["loss"] for r in records], color="0.75", linewidth=0.8, label="loss")
    top.plot(steps, smooth([r["loss"] for r in records]), color="0.15", linewidth=1.6, label="smoothed")
    bottom.plot(steps, [r["lr"] for r in records], color="0.15")
    for number, (name, group) in enumerate(groupby(records, key=lambda r: (r["stage"], r["seq_len"]))):
        part = list(group)
        colour = COLOURS[number % len(COLOURS)]
        for axes in (top, bottom):
            axes.axvspan(part[0]["step"] - 1, part[-1]["step"], color=colour, alpha=0.15, linewidth=0)
        top.text(
            part[0]["step"], 1.02, f"{name[0]}\n{name[1]} tokens", transform=top.get_xaxis_transform(),
            va="bottom", color=colour, fontweight="bold",
        )  # fmt: skip
    top.set_ylabel("loss (nats per token)")
    top.legend(loc="upper right", frameon=False)
    top.margins(x=0)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average, unbiased at the start."""
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run's dump folder, or its metrics.jsonl")
    parser.add_argument("--output", type=Path, help="the picture (default: loss.png beside metrics.jsonl)")
    options = parser.parse_args(argv)
    folder = options.run if options.run.is_dir() else options.run.parent
    output = options.output or folder / "loss.png"
    plot(read(options.run), output)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
