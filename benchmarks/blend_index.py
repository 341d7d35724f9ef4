"""Draw order of a blend against megatron-core's `build_blending_indices` (pip install megatron-core --no-deps).

    python benchmarks/blend_index.py             start on 4 ranks, 64 sources, 10^8 samples: time to the first batch
    python benchmarks/blend_index.py --expand    all of 10^7 draws written out, nine mixes

Start: all ranks open and prove the 64 folders, receive rank 0's index, and read their share of the first batch of 1024
rows; megatron-core's time is that of its blend alone in one process, with nothing opened, sent or read. Expansion: both
sides include the allocation of what they write, ours the reading of the weights. Code is compiled and loaded before.
Figures are medians of five runs, alternating. Prints the worst ratio and its bar last; exits 1 below it.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from common import DataStage, alone, seconds, write_tokens

from megastage.data import compiled
from megastage.data.blend import BlendTable, integer_weights
from megastage.data.engine import DataEngine
from ranks import run_ranks

RUNS = 5
SOURCES, SAMPLES = 64, 100_000_000
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
    with tempfile.TemporaryDirectory() as name, alone():
        folders = []
        for i in range(SOURCES):
            folders.append(str(write_tokens(Path(name) / f"s{i:02}", 400_000, seed=i).parent))
        times, theirs = run_ranks(4, start_on_ranks, folders, helpers, timeout_s=600)[0]
    ours = statistics.median(times)
    print(f"first batch of {BATCH} on 4 ranks: {ours * 1000:.1f} ms; megatron-core's {SAMPLES:,} draws: {theirs:.2f} s")
    print(f"ratio={theirs / ours:.1f} bar={START_BAR:g}")
    return theirs / ours / START_BAR


def start_on_ranks(folders: list[str], helpers: Any) -> tuple[list[float], float]:
    """Seconds until every rank has its first batch, by round, and megatron-core's; on this rank."""
    dist.init_process_group("gloo")
    group, rank, ours, theirs = dist.group.WORLD, dist.get_rank(), [], []
    weights = tuple(mixes(SOURCES)["harmonic"].tolist())
    stage = DataStage(dataset_folders=tuple(folders), dataset_weights=weights, global_batch_size=BATCH)
    for _ in range(RUNS + 1):
        dist.barrier(group)
        begin = time.perf_counter()
        engine = DataEngine.build([stage], group=group, vocab_size=50_257)
        engine.enter(0, data_rank=rank, data_ranks=4)
        engine.next()
        dist.barrier(group)
        ours.append(time.perf_counter() - begin)
        engine.close()
        if rank == 0:
            theirs.append(seconds(lambda: megatron(helpers, np.array(weights), SAMPLES)))
    dist.destroy_process_group()
    return ours[1:], statistics.median(theirs or [0.0])


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
