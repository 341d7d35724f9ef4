"""Whole preprocessing runs of 200 MB of text: against the bare tokenizer, per core, and datatrove's pipeline.

    python benchmarks/preprocess.py [--megabytes 200] [--runs 5]        (pip install gigatoken datatrove)

The text is the source code and docstrings that Python's packages bring, as JSON lines; the tokenizer is a byte-level
BPE of 8192 entries trained on it. Ours is the command, from start to finished data set. Raw is `encode_batch_fast` on
texts that are in memory already, on one thread a core. The tokens of all runs are compared; with several runs, which go
in turn, the medians count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from common import ROOT, alone, show, verdict

from megastage.data.packed_memmap import open_packed_memmap
from megastage.data.tokenizer import load_tokenizer, train_bpe

RAW_BAR, DATATROVE_BAR = 0.9, 15.0
BATCH = 256


def write_text(file: Path, megabytes: int) -> list[str]:
    """Python files of the standard library and the installed packages, again with another head when they run out."""
    roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    found = (path for root in roots for path in sorted(root.rglob("*.py")) if path.stat().st_size > 1000)
    texts, size = [], 0
    for path in found:
        text = path.read_text("utf-8", "replace")[:200_000]
        texts.append(text)
        size += len(text)
        if size > megabytes * 1_000_000:
            break
    with open(file, "w") as out:
        for text in texts:
            out.write(json.dumps({"text": text}) + "\n")
    return texts


def command(text: Path, tokenizer: Path, output: Path, workers: int, engine: str) -> float:
    start = time.perf_counter()
    from subprocess import DEVNULL, check_call

    arguments = [str(text), "--tokenizer", str(tokenizer), "--output", str(output), "--engine", engine]
    check_call(
        [sys.executable, "-m", "tools.preprocess", *arguments, "--workers", str(workers), "--overwrite"],
        cwd=ROOT, stdout=DEVNULL, stderr=DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - start


def raw(texts: list[str], tokenizer: Path, workers: int) -> float:
    """Seconds of the bare tokenizer over all texts, each worker with its share in memory before the clock starts."""
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(workers + 1)
    team = [context.Process(target=_raw_worker, args=(texts[i::workers], tokenizer, gate)) for i in range(workers)]
    for process in team:
        process.start()
    gate.wait()
    start = time.perf_counter()
    gate.wait()
    seconds = time.perf_counter() - start
    for process in team:
        process.join()
    return seconds


def _raw_worker(texts: list[str], tokenizer: Path, gate: object) -> None:
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    engine = tokenizers.Tokenizer.from_file(str(tokenizer))
    gate.wait()
    for i in range(0, len(texts), BATCH):
        engine.encode_batch_fast(texts[i : i + BATCH], add_special_tokens=False)
    gate.wait()


def datatrove(text: Path, tokenizer: Path, output: Path) -> tuple[float, np.ndarray]:
    """Seconds and tokens of datatrove's tokenizer pipeline with one worker."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    start = time.perf_counter()
    LocalPipelineExecutor(
        [
            JsonlReader(str(text.parent), glob_pattern=text.name),
            DocumentTokenizer(str(output), tokenizer_name_or_path=str(tokenizer), shuffle_documents=False,
                              eos_token="<|endoftext|>"),
        ],
        tasks=1, workers=1, logging_dir=str(output) + "-logs", skip_completed=False,
    ).run()  # fmt: skip
    seconds = time.perf_counter() - start
    (file,) = output.rglob("*.ds")
    return seconds, np.fromfile(file, np.uint16)


def one_run(
    folder: Path, texts: list[str], text: Path, tokenizer: Path, tokens: dict[str, np.ndarray], fast_only: bool
) -> Iterator[tuple[str, float]]:
    """(name, seconds) of each way once; adds its tokens by name."""
    folder.mkdir()
    for workers in (1, 2):
        if not fast_only:
            yield f"raw, {workers}", raw(texts, tokenizer, workers)
        for engine in ("gigatoken",) if fast_only else ("hf", "gigatoken"):
            output = folder / f"{engine}-{workers}"
            yield f"{engine}, {workers}", command(text, tokenizer, output, workers, engine)
            tokens[output.name] = np.asarray(open_packed_memmap(output).tokens)
    seconds, tokens["datatrove"] = datatrove(text, tokenizer, folder / "datatrove")
    yield "datatrove, 1", seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--fast-only", action="store_true", help="leave out the tokenizers library's engine (minutes)")
    parser.add_argument("--runs", type=int, default=1, help="of everything; 200 MB take some 8 minutes each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, alone():
        folder = Path(name)
        text, tokenizer = folder / "in" / "x.jsonl", folder / "tokenizer.json"
        text.parent.mkdir()
        texts = write_text(text, args.megabytes)
        train_bpe(texts[: 4_000_000 // 10_000], 8192, tokenizer)
        assert load_tokenizer(tokenizer).eos_id is not None
        taken: dict[str, list[float]] = {}
        tokens: dict[str, np.ndarray] = {}
        for run in range(args.runs):
            for name, seconds in one_run(folder / str(run), texts, text, tokenizer, tokens, args.fast_only):
                taken.setdefault(name, []).append(seconds)
        times = {name: statistics.median(values) for name, values in taken.items()}
        first = tokens["datatrove"]  # which uses the tokenizers library too
        different = [name for name, values in tokens.items() if not np.array_equal(values, first)]
        size = sum(len(each.encode()) for each in texts) / 1e6
    show(f"{size:.0f} MB, {len(first):,} tokens, rate (workers):", {k: size / v for k, v in times.items()}, "MB/s")
    if different:
        sys.exit(f"other tokens than the tokenizers library: {', '.join(different)}")
    met = args.fast_only or verdict(
        min(times[f"raw, {n}"] / times[f"hf, {n}"] for n in (1, 2)), RAW_BAR, "hf engine against raw"
    )
    fast = verdict(times["datatrove, 1"] / times["gigatoken, 1"], DATATROVE_BAR, "gigatoken against datatrove")
    sys.exit(not (met and fast))


if __name__ == "__main__":
    main()
