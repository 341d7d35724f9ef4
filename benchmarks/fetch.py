"""Random samples of 4096 tokens with document bounds and labels, one process, from the page cache.

    python benchmarks/fetch.py [--rows 16] [--million-tokens 100]

Ours: `assemble` of whole batches (tokens, labels, cu_seqlens as tensors; vocabulary checked). Against it, per sample:
- megatron-core's plain `GPTDataset.__getitem__` (no document mask, no position reset);
- the copy that nobody can do without: 4097 tokens of the uint16 map to int64, one new array a sample.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import alone, in_turn, megatron_config, show, verdict, write_tokens

from megastage.data.batch import assemble
from megastage.data.fetch import RowTools
from megastage.data.order import Rows
from megastage.data.sources.base import open_source

T = 4096
SAMPLES = 2048
MEGATRON_BAR, RAW_BAR = 5.0, 0.45


def megatron_dataset(prefix: Path, samples: int, cache: Path) -> Any:
    config = megatron_config(cache, T, ([str(prefix)], None))
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    data = IndexedDataset(str(prefix))
    return GPTDataset(data, str(prefix), np.arange(len(data.sequence_lengths)), samples, Split.train, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--million-tokens", type=int, default=100)
    parser.add_argument("--plain", action="store_true", help="without the compiled loops")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, alone():
        prefix = write_tokens(Path(folder) / "data", args.million_tokens * 1_000_000)
        source = open_source("nanoset", prefix.parent)
        tools = RowTools() if args.plain else RowTools.make([source], 1 << 30)
        if tools.kernels is None:
            print("the plain code is timed")
        tokens = source.read(0, source.n_tokens)
        tokens.max()  # into the page cache
        starts = np.random.default_rng(1).integers(0, source.n_tokens - T - 1, SAMPLES)
        B = args.rows
        offsets, lengths, first = np.arange(B + 1), np.full(B, T), np.zeros(B, np.int64)
        plan = starts.tolist()
        theirs = megatron_dataset(prefix, SAMPLES, Path(folder) / "cache")

        def ours() -> None:
            for i in range(0, SAMPLES, B):
                rows = Rows(offsets, starts[i : i + B], lengths)
                assemble([source], first, starts[i : i + B], rows, seq_len=T, document_mask=True, vocab_size=50_257,
                         tools=tools)  # fmt: skip

        def megatron() -> None:
            for i in range(SAMPLES // 4):
                theirs[i]

        def raw() -> None:
            for start in plan:
                tokens[start : start + T + 1].astype(np.int64)

        def raw_batches() -> None:
            for i in range(0, SAMPLES, B):
                out = np.empty((B, T + 1), np.int64)
                for r, start in enumerate(plan[i : i + B]):
                    out[r] = tokens[start : start + T + 1]

        times = in_turn({"ours": ours, "megatron": megatron, "raw": raw, "raw, whole batches": raw_batches})
        times["megatron"] *= 4
    show(f"{B} rows a batch, a sample:", {name: value / SAMPLES * 1e6 for name, value in times.items()}, "us")
    print(f"against raw in whole batches: {times['raw, whole batches'] / times['ours']:.2f}")
    met = verdict(times["megatron"] / times["ours"], MEGATRON_BAR, "megatron-core")
    sys.exit(not (verdict(times["raw"] / times["ours"], RAW_BAR, "raw copy") and met))


if __name__ == "__main__":
    main()
