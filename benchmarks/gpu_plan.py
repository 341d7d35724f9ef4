"""What benchmarks/gpu.py does, in which order, and how long each piece should take on an H100.

Times are counted, not measured: products at the rates below, everything else by the bytes that it moves, and what must
be compiled by a round figure. They decide only what still fits into the minutes, and are corrected by what was seen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gpu_cases import CAUSAL, DOCUMENTS, OPS, Sizes

CHECK_LENGTHS = (1024, 1536)
FIRST_LENGTHS = (32768, 131072, 8192)  # timed before all others, in this order
SLOW_TO_START = ("flex",)  # compiled for every length: after all else
LEAST_S = 0.1  # time each way is given, compilation aside
FLOP_PER_S, BYTES_PER_S = 400e12, 2.4e12
SHARE_OF_RATE = {"ours": 0.9, "sdpa flash": 0.8, "sdpa cudnn": 1.3, "torch varlen": 0.8, "flex": 0.7}
STARTUP_S = {"flex": 30.0, "sdpa cudnn": 3.0}
CHECK_S = 1.5
GPU_BYTES = 76 * 2**30  # what needs more than that beside its inputs is not begun on an H100, and takes no time


@dataclass(frozen=True)
class Item:
    """One piece of work. way: empty for a check. scratch_bytes: what it needs on the GPU beside its inputs."""

    op: str
    length: int
    way: str = ""
    expected_s: float = 0.0
    scratch_bytes: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.op}|{self.length}|{self.way}"


def checks(lengths: Sequence[int], forms: Iterable[str], wanted: str) -> list[Item]:
    """Every op at two lengths, then the forms of `gpu_checks`."""
    items = [Item(op, length, "", CHECK_S) for op in OPS for length in lengths]
    items += [Item(form, 0, "", CHECK_S) for form in forms]
    return [item for item in items if wanted in item.op]


def timings(lengths: Sequence[int], sizes: Sizes, wanted: str, itemsize: int, flex: bool) -> list[Item]:
    """What matters most first: the long rows of FIRST_LENGTHS, then the others from the shortest on."""
    ordered = [n for n in FIRST_LENGTHS if n in lengths]
    ordered += sorted(set(lengths) - set(ordered))
    items = [
        Item(op, T, way, seconds(op, T, way, sizes, itemsize), scratch(op, T, way, sizes, itemsize))
        for late in (False, True)
        for T in ordered
        for op, case in OPS.items()
        for way in case.ways
        if wanted in op and (way in SLOW_TO_START) == late
    ]
    return [item for item in items if flex or item.way not in SLOW_TO_START]


def seconds(op: str, T: int, way: str, sizes: Sizes, itemsize: int) -> float:
    """Expected wall-clock time of measuring one way: its start, and the calls of `gpu_measure.median_ms`."""
    if scratch(op, T, way, sizes, itemsize) > GPU_BYTES:
        return 0.1
    forward_s, train_s = call_seconds(op, T, way, sizes, itemsize)
    calls = [s for s in (forward_s, train_s) if s]
    return STARTUP_S.get(way, 0.5) + sum(s + max(LEAST_S, s * (3 if s < 1 else 1)) for s in calls)


def call_seconds(op: str, T: int, way: str, sizes: Sizes, itemsize: int) -> tuple[float, float]:
    """(forward, forward + backward or 0 for ops that have none) of one call."""
    if op in (CAUSAL, DOCUMENTS):
        if way == "plain":
            scores_s = sizes.heads * T * T * itemsize / BYTES_PER_S
            return 8 * scores_s, 18 * scores_s
        pairs = T * (T if op == CAUSAL else min(T, 1.3 * sizes.mean_document)) / 2
        forward_s = 4 * pairs * sizes.heads * sizes.head_dim / FLOP_PER_S / SHARE_OF_RATE[way]
        return forward_s, 6 * forward_s  # 2.5 times the products, at half the rate
    if op == "linear cross-entropy":
        logits_s = T * sizes.vocab * 4 / BYTES_PER_S
        product_s = 2 * T * sizes.dim * sizes.vocab / FLOP_PER_S
        passes = 12 if way == "plain" else 6
        return product_s + logits_s * passes / 2, 4 * product_s + logits_s * passes
    row = {
        "rms_norm": 2 * sizes.dim, "add + rms_norm": 4 * sizes.dim, "swiglu": 3 * sizes.ffn_dim,
        "rope": 2 * (sizes.heads + sizes.kv_heads) * sizes.head_dim,
    }  # fmt: skip
    if op in row:
        forward_s = T * row[op] * itemsize * (1 if way == "ours" else 3) / BYTES_PER_S
        return forward_s, 3 * forward_s
    moved = {"adamw": 28, "global norm": 4}[op] * T * sizes.dim
    return moved * (2 if way in ("plain", "torch foreach") else 1) / BYTES_PER_S, 0.0


def scratch(op: str, T: int, way: str, sizes: Sizes, itemsize: int) -> float:
    """Bytes that a way needs at its worst, beside its inputs and what every way returns. Only for ways that are known
    to need more than a GPU may have; the others are tried."""
    if op in (CAUSAL, DOCUMENTS) and way == "plain":
        return (3 * sizes.heads * itemsize + 3) * T * T  # scores, masked scores and weights; the mask and its halves
    if op == "linear cross-entropy" and way == "plain":
        return (itemsize + 8) * T * sizes.vocab
    return 0.0


class Budget:
    """Seconds left, and whether an item fits into them. A way that took longer than expected is expected to again."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.end_s = clock() + seconds
        self.scale: dict[str, float] = {}

    def left_s(self) -> float:
        return self.end_s - self.clock()

    def expected_s(self, item: Item) -> float:
        return item.expected_s * self.scale.get(item.way, 1.0)

    def fits(self, item: Item) -> bool:
        return self.expected_s(item) <= self.left_s()

    def learn(self, item: Item, took_s: float) -> None:
        if item.expected_s > 0:
            self.scale[item.way] = min(max(took_s / item.expected_s, 0.2), 20.0)


def table(items: Sequence[Item], minutes: float) -> str:
    """Markdown: each item, when it should begin, and whether that is in time."""
    lines = ["| begins at s | op | tokens | way | takes s | GiB beside the inputs |", "|---|" + "---|" * 5]
    at, limit = 0.0, 60 * minutes
    late = 0
    for item in items:
        fits = at + item.expected_s <= limit
        late += not fits
        what = f"| {item.op} | {item.length or ''} | {item.way or 'check'} | {item.expected_s:.1f} |"
        lines.append(f"| {f'{at:.0f}' if fits else 'no time'} {what} {item.scratch_bytes / 2**30:.1f} |")
        at += item.expected_s if fits else 0.0
    total = math.fsum(item.expected_s for item in items)
    lines.append(f"\n{total:.0f} s in all, {at:.0f} of {limit:.0f} s are planned; no time for {late} of {len(items)}")
    return "\n".join(lines)
