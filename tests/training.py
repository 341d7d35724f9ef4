"""Runs of the whole trainer in forked ranks, for tests: tiny models on small nanosets written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import pretrain  # here and not in the ranks: they are forked, and share what is imported
from ranks import run_ranks

VOCAB = 2048
TINY = [
    "--model.dim", "64", "--model.n_layers", "4", "--model.n_heads", "4", "--model.n_kv_heads", "2",
    "--model.head_dim", "16", "--model.ffn_dim", "160", "--model.vocab_size", str(VOCAB), "--optimizer.lr", "3e-3",
    "--training.mixed_precision_param", "float32", "--debug.seed", "7", "--lr_scheduler.warmup_steps", "2",
]  # fmt: skip


def write_nanoset(folder: Path, tokens: int, seed: int, mean_document: int = 200) -> Path:
    """A nanoset as datatrove lays it out: random tokens with some structure, documents ended by token 0."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, 6, tokens)
    data = ((np.cumsum(steps) * 7 + seed * 100) % (VOCAB - 1) + 1).astype("<u2")
    ends, at = [], 0
    while at < tokens:
        at = min(tokens, at + 1 + int(rng.exponential(mean_document)))
        ends.append(at)
    data[np.array(ends) - 1] = 0
    data.tofile(folder / "00000.ds")
    np.array(ends, "<u8").tofile(folder / "00000.ds.index")
    (folder / "00000.ds.metadata").write_text(f"tokenizer|2\n{tokens}\n{tokens / 1e6} M tokens\n")
    return folder


def _rank(argv: list[str]) -> None:
    code = pretrain.main(argv)
    assert code == 0, f"exit code {code}"


def train(world: int, argv: list[str], timeout_s: float = 240) -> list[dict[str, Any]]:
    """Run pretrain.py's main in `world` ranks; returns the records of metrics.jsonl."""
    run_ranks(world, _rank, argv, timeout_s=timeout_s)
    return records(argv)


def records(argv: list[str]) -> list[dict[str, Any]]:
    """What a run wrote to metrics.jsonl."""
    folder = Path(argv[argv.index("--job.dump_folder") + 1])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def layout_flags(dp: int = 1, tp: int = 1, pp: int = 1, cp: int = 1, rep: int = 1) -> list[str]:
    """Command-line keys of a layout."""
    return [
        "--parallelism.data_parallel_shard_degree", str(dp), "--parallelism.tensor_parallel_degree", str(tp),
        "--parallelism.pipeline_parallel_degree", str(pp), "--parallelism.context_parallel_degree", str(cp),
        "--parallelism.data_parallel_replicate_degree", str(rep),
    ]  # fmt: skip
