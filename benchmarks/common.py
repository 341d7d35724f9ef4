"""What the data benchmarks share: one at a time on a machine, medians in turn, made-up data, the line with the bar."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np

ROOT = Path(__file__).parent.parent
RUNS = 5
DOCUMENT_TOKENS = 600  # mean of made-up documents


@contextmanager
def alone() -> Iterator[None]:
    """Wait until no other of these benchmarks runs on this machine."""
    with open(Path(tempfile.gettempdir()) / "megastage-benchmark.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(functions: Mapping[str, Callable[[], object]], runs: int = RUNS, *, warm: bool = True) -> dict[str, float]:
    """Median seconds of each; every round runs all of them, so that a noisy neighbour meets all."""
    if warm:
        for function in functions.values():
            function()
    times = [{name: seconds(function) for name, function in functions.items()} for _ in range(runs)]
    return {name: statistics.median(each[name] for each in times) for name in functions}


def verdict(ratio: float, bar: float, note: str = "") -> bool:
    """Print the last line of a benchmark; whether the bar is met."""
    print(f"ratio={ratio:.2f} bar={bar:g}{f' ({note})' if note else ''}")
    return ratio >= bar


def write_tokens(folder: Path, n_tokens: int, *, seed: int = 0, vocab_size: int = 50_257) -> Path:
    """A data set in three forms that share the token file: nanoset `x.ds`, Megatron `x.bin` + `x.idx`. Returns `x`."""
    from megastage.data.sources.megatron import HEADER, MAGIC

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = rng.integers(1, vocab_size, n_tokens, dtype=np.uint16)
    lengths = np.clip(rng.lognormal(np.log(DOCUMENT_TOKENS) - 0.5, 1.0, n_tokens // DOCUMENT_TOKENS + 64), 2, 2**20)
    ends = np.cumsum(lengths.astype(np.int64))
    ends = np.append(ends[ends < n_tokens - 1], n_tokens)
    tokens[ends - 1] = 0
    tokens.tofile(folder / "x.ds")
    (folder / "x.bin").hardlink_to(folder / "x.ds")
    ends.astype("<u8").tofile(folder / "x.ds.index")
    (folder / "x.ds.metadata").write_text(f"made-up|2\n{n_tokens}\n")
    lengths = np.diff(ends, prepend=0)
    with open(folder / "x.idx", "wb") as file:
        file.write(MAGIC + HEADER.pack(1, 8, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes() + ((ends - lengths) * 2).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
    return folder / "x"


def show(title: str, values: Mapping[str, float], unit: str = "s") -> None:
    print(title, json.dumps({name: float(f"{value:.4g}") for name, value in values.items()}), unit)


@dataclass(frozen=True)
class DataStage:
    """The fields of a stage that the data engine reads."""

    index: int = 0
    name: str = "one"
    start_step: int = 0
    end_step: int = 1_000_000
    never_runs: bool = False
    dataset: str | None = None
    dataset_path: str | None = None
    dataset_type: str = "nanoset"
    dataset_folders: tuple[str, ...] = ()
    dataset_weights: tuple[float, ...] = ()
    dataset_random_seed: int = 1
    seq_len: int = 4096
    global_batch_size: int = 1024
    document_mask: bool = True
    min_doc_len: int = 0
    long_doc_len: int = 0
    long_doc_share: float | None = None


def megatron_config(cache: Path | None, seq_len: int, blend: Any) -> Any:
    """A plain configuration of megatron-core's GPT data set: no document mask, no position reset."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    class Tokenizer:
        """All that the data set asks of a tokenizer."""

        unique_identifiers: ClassVar[dict[str, str]] = {"class": "made-up"}
        eod, pad, vocab_size = 0, 0, 50_257

    return GPTDatasetConfig(
        random_seed=1, sequence_length=seq_len, blend=blend, split="1,0,0", tokenizer=Tokenizer(),
        path_to_cache=None if cache is None else str(cache), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
