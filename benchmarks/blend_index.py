"""Draw order of a blend against megatron-core's `build_blending_indices` (pip install megatron-core --no-deps).

    python benchmarks/blend_index.py             start: one process, 64 sources, 10^8 samples; time to the first batch
    python benchmarks/blend_index.py --expand    all of 10^7 draws written out, nine mixes

Both sides include the allocation of what they write; ours includes reading the weights. Code is compiled and loaded
before. Figures are medians of five runs, alternating. Prints the worst ratio and its bar last; exits 1 below it.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megastage.data import compiled
from megastage.data.blend import BlendTable, integer_weights
from megastage.data.lanes import LaneOrder, choose_lanes

RUNS = 5
BATCH = 1024
SLOW_FROM_K = 512  # megatron-core's time is linear in draws: with many sources a tenth of them is timed
BARS = {8: 2.5, 64: 6.0, 1000: 50.0}
START_BAR = 50.0


def load_helpers() -> Any:
    """megatron-core's compiled helpers alone, without the imports of the package around them."""
    spec = importlib.util.find_spec("megatron")
    for root in spec.submodule_search_locations or [] if spec else []:
        for path in (Path(root) / "core" / "datasets").glob("helpers_cpp*.so"):
            loader = importlib.machinery.ExtensionFileLoader("helpers_cpp", str(path))
            module_spec = importlib.util.spec_from_loader("helpers_cpp", loader)
            assert module_spec is not None
            module = importlib.util.module_from_spec(module_spec)
            loader.exec_module(module)
            return module
    sys.exit("megatron-core with its compiled helpers is needed: pip install megatron-core --no-deps")


def mixes(k: int) -> dict[str, np.ndarray]:
    dirichlet = np.random.default_rng(0).dirichlet(np.full(k, 0.5))
    raw = {
        "harmonic": 1 / (np.arange(k) + 1),
        "dirichlet": np.maximum(dirichlet, 1e-9),
        "one big": np.concatenate(([0.9], np.full(k - 1, 0.1 / (k - 1)))),
    }
    return {name: weights / weights.sum() for name, weights in raw.items()}


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(ours: Callable[[], object], theirs: Callable[[], object], their_scale: float) -> tuple[float, float]:
    """Median seconds of both, measured in turn."""
    ours()
    pairs = [(seconds(ours), seconds(theirs) * their_scale) for _ in range(RUNS)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def megatron(helpers: Any, weights: np.ndarray, n: int) -> None:
    source, sample = np.zeros(n, np.int16), np.zeros(n, np.int64)
    helpers.build_blending_indices(source, sample, weights, weights.size, n, False)


def expand(helpers: Any) -> float:
    n, worst = 10_000_000, float("inf")
    print(f"{'k':>5} {'weights':>10} {'period':>8} {'ours, s':>8} {'megatron, s':>12} {'ratio':>7}   bar")
    for k, bar in BARS.items():
        for name, weights in mixes(k).items():
            their_n = n // 10 if k >= SLOW_FROM_K else n

            def build(weights: np.ndarray = weights) -> BlendTable:
                table = BlendTable.build(integer_weights(weights.tolist()))
                table.expand(n)
                return table

            def build_theirs(weights: np.ndarray = weights, their_n: int = their_n) -> None:
                megatron(helpers, weights, their_n)

            ours, theirs = compare(build, build_theirs, n / their_n)
            ratio = theirs / ours
            worst = min(worst, ratio / bar)
            print(f"{k:>5} {name:>10} {build().period:>8} {ours:>8.3f} {theirs:>12.3f} {ratio:>7.1f}   {bar}")
    print(f"ratio={worst:.2f} bar=1 (the least of the ratios, each over its own bar)")
    return worst


def start(helpers: Any) -> float:
    k, n, n_tokens, seq_len = 64, 100_000_000, 10_000_000_000, 4096
    weights = mixes(k)["harmonic"]

    def first_batch() -> None:
        table = BlendTable.build(integer_weights(weights.tolist()))
        source, counter = table.draws(0, BATCH)
        lanes = choose_lanes(n_tokens, seq_len)
        for i in np.unique(source):
            order = LaneOrder(n_tokens, superblock=seq_len, lanes=lanes, seed=1, fingerprint=bytes([i]) * 32)
            order.enter([], seq_len).rows(counter[source == i])

    ours, theirs = compare(first_batch, lambda: megatron(helpers, weights, n), 1)
    print(f"first batch of {BATCH}: {ours * 1000:.1f} ms; megatron-core's index of {n:,} samples: {theirs:.2f} s")
    print(f"ratio={theirs / ours:.1f} bar={START_BAR:g}")
    return theirs / ours / START_BAR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expand", action="store_true", help="write all draws out")
    args = parser.parse_args()
    if compiled.blend_period() is None:
        print("numba is not installed: the plain builder is timed")
    helpers = load_helpers()
    sys.exit((expand if args.expand else start)(helpers) < 1)


if __name__ == "__main__":
    main()
