"""Time from a checkpoint's data state to the first batch: deep inside a stage of 10^9 samples, and after six stages.

    python benchmarks/resume.py

Timed are opening and proving all sources, the indexes of all stages, entering the stage and reading this rank's share
(a 64th of a batch of 4 M tokens); imports and the loading of compiled code are not, as they do not depend on the run.
Bars: the slowest below 50 ms, and (flat) at most twice the time of a run's very first batch.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import DataStage, alone, in_turn, show, verdict, write_tokens

from megastage.data.engine import DataEngine
from megastage.data.packed_memmap import PackedMemmapWriter

LIMIT_S, FLAT = 0.05, 2.0
STEP = 1_000_000
LENGTHS = (4096, 8192, 4096, 6000, 2048, 32_768)
BATCH_TOKENS = 1024 * 4096
RANKS = 64


def stages_of(folders: list[str], dataset_type: str) -> list[DataStage]:
    return [
        DataStage(
            i, f"s{i}", i * STEP, (i + 1) * STEP, dataset_folders=tuple(folders), dataset_type=dataset_type,
            dataset_weights=(0.4, 0.3, 0.2, 0.1), seq_len=length, global_batch_size=BATCH_TOKENS // length,
        )
        for i, length in enumerate(LENGTHS)
    ]  # fmt: skip


def first_batch(stages: list[DataStage], state: dict[str, Any] | None, number: int) -> DataEngine:
    engine = DataEngine.build(stages, state=state, vocab_size=50_257)
    engine.enter(number, data_rank=0, data_ranks=RANKS)
    engine.next()
    return engine


def state_at(stages: list[DataStage], samples: list[int]) -> dict[str, Any]:
    """The state of a run that consumed so many samples of each stage."""
    engine = DataEngine.build(stages)
    engine.enter(0, data_rank=0, data_ranks=RANKS)
    state = engine.state()
    (first,) = state["stages"]
    state["stages"] = []
    for stage, count in zip(stages, samples):
        record = {**first, "index": stage.index, "name": stage.name, "seq_len": stage.seq_len, "samples": count}
        # as running leaves them: a block, and the stage's rows before it
        if stage.dataset_type == "packed_memmap" and count > 1_000_000:
            counts = engine.index.stages[stage.index].table.counts_at(count).tolist()
            keys = [f"{fingerprint}:{record['seed']}" for fingerprint in first["sources"]]
            record["marks"] = {key: [1000 * (stage.index + 1), rows - 7] for key, rows in zip(keys, counts)}
        state["stages"].append(record)
    return state


def write_documents(folder: Path, seed: int) -> str:
    rng = np.random.default_rng(seed)
    with PackedMemmapWriter(folder, "uint16") as writer:
        for _ in range(20):
            lengths = np.clip(rng.lognormal(6, 1, 1000).astype(np.int64), 2, 30_000)
            writer.extend(rng.integers(0, 50_000, int(lengths.sum()), dtype=np.uint16), lengths)
    return str(folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, alone():
        streams = [str(write_tokens(Path(folder) / f"s{i}", 20_000_000, seed=i).parent) for i in range(4)]
        documents = [write_documents(Path(folder) / f"d{i}", i) for i in range(4)]
        worst, ratio = 0.0, 0.0
        for kind, folders in (("nanoset", streams), ("packed_memmap", documents)):
            stages = stages_of(folders, kind)
            deep = state_at(stages, [STEP * 1024])
            six = state_at(stages, [STEP * stage.global_batch_size for stage in stages[:5]] + [100])
            times = in_turn(
                {
                    "run start": lambda s=stages: first_batch(s, None, 0),
                    "step 10^6 of 10^9 samples": lambda s=stages, d=deep: first_batch(s, d, 0),
                    "after six stages": lambda s=stages, d=six: first_batch(s, d, 5),
                }
            )
            show(f"{kind}, first batch:", {name: value * 1e3 for name, value in times.items()}, "ms")
            start, *resumed = times.values()
            worst, ratio = max(worst, *resumed), max(ratio, max(resumed) / start)
    flat = verdict(FLAT / ratio, 1, f"flat: at most {FLAT:g} times the run's start")
    sys.exit(not (verdict(LIMIT_S / worst, 1, f"50 ms against {worst * 1e3:.1f} ms") and flat))


if __name__ == "__main__":
    main()
