"""Whole preprocessing runs over 200 MB of text, against the bare tokenizer, per core, and datatrove's pipeline.

    python benchmarks/preprocess.py [--megabytes 200] [--rounds 5]        (pip install gigatoken datatrove)

The text is the source code and docstrings that Python's packages bring, as JSON lines; the tokenizer is a byte-level
BPE of 8192 entries trained on it. Ours is the command over all of it: from the start of the process to its end, with
reading, writing and syncing, by 1 and by 2 workers. Raw is `encode_batch_fast` on texts that are in memory already,
on as many cores. The text lies in one file a round, all of one mixture since they take its documents in turn; a round
compares whole runs with the rates of raw and datatrove on one of the files, raw's half before a run and half after, so
that a machine that grows slower is slower for both. The medians of the rounds' ratios count. Two workers of datatrove
are taken to be twice as fast as one, which flatters it. Tokens and documents of all are compared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, alone, show, verdict

from megastage.data.packed_memmap import open_packed_memmap
from megastage.data.tokenizer import train_bpe

RAW_BAR, DATATROVE_BAR = 0.9, 15.0
BATCH = 256
WORKERS = (1, 2)


def python_text(megabytes: int) -> Iterator[str]:
    """Python files of the standard library and the installed packages."""
    roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    found = (path for root in roots for path in sorted(root.rglob("*.py")) if path.stat().st_size > 1000)
    size = 0
    for path in found:
        text = path.read_text("utf-8", "replace")[:200_000]
        yield text
        size += len(text.encode())
        if size > megabytes * 1_000_000:
            return
    sys.exit(f"the installed packages hold only {size / 1e6:.0f} MB of Python, fewer than --megabytes {megabytes}")


@dataclass
class Corpus:
    """The text, dealt to one file a round."""

    folder: Path
    texts: list[list[str]]  # of each file
    tokenizer: Path
    megabytes: float = 0.0
    documents: list[np.ndarray] = field(default_factory=list)  # the tokens of all documents, as first seen

    @staticmethod
    def write(folder: Path, megabytes: int, rounds: int) -> Corpus:
        texts = list(python_text(megabytes))
        corpus = Corpus(folder / "in", [texts[i::rounds] for i in range(rounds)], folder / "tokenizer.json")
        corpus.folder.mkdir()
        for i, part in enumerate(corpus.texts):
            with open(corpus.file(i), "w", encoding="utf-8") as out:
                out.writelines(json.dumps({"text": text}) + "\n" for text in part)
        corpus.megabytes = sum(len(text.encode()) for text in texts) / 1e6
        train_bpe(texts[:400], 8192, corpus.tokenizer)
        return corpus

    def file(self, number: int) -> Path:
        return self.folder / f"{number:02d}.jsonl"

    def part_megabytes(self, number: int) -> float:
        return sum(len(text.encode()) for text in self.texts[number]) / 1e6

    def check(self, name: str, tokens: np.ndarray, ends: np.ndarray, number: int | None = None) -> None:
        """Ends the program where a run over file `number`, or all of them, made other documents than the first."""
        got = np.split(tokens, ends[:-1].astype(np.int64))
        if not self.documents:
            self.documents = [document.copy() for document in got]
        first = sum(map(len, self.texts[:number])) if number is not None else 0
        count = len(self.texts[number]) if number is not None else len(self.documents)
        expected = self.documents[first : first + count]
        if len(got) != count or not all(map(np.array_equal, got, expected)):
            sys.exit(f"{name}: other tokens than the run before it")


def command(corpus: Corpus, output: Path, workers: int, engine: str) -> float:
    """MB/s of the whole command."""
    arguments = [corpus.folder, "--tokenizer", corpus.tokenizer, "--output", output, "--engine", engine]
    arguments += ["--workers", workers, "--overwrite"]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "tools.preprocess", *map(str, arguments)], cwd=ROOT, check=True, capture_output=True
    )
    rate = corpus.megabytes / (time.perf_counter() - start)
    data = open_packed_memmap(output)
    corpus.check(f"{engine}, {workers} workers", data.tokens, data.doc_ends)
    return rate


def raw_seconds(texts: list[str], tokenizer: Path, workers: int) -> float:
    """Seconds of the bare tokenizer over the texts, each worker with its share in memory before the clock starts."""
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


def _raw_worker(texts: list[str], tokenizer: Path, gate: Any) -> None:
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    engine = tokenizers.Tokenizer.from_file(str(tokenizer))
    gate.wait()
    for i in range(0, len(texts), BATCH):
        engine.encode_batch_fast(texts[i : i + BATCH], add_special_tokens=False)
    gate.wait()


def datatrove(corpus: Corpus, number: int, output: Path) -> float:
    """MB/s of datatrove's tokenizer pipeline with one worker, its imports not counted, over one file."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    start = time.perf_counter()
    LocalPipelineExecutor(
        [
            JsonlReader(str(corpus.folder), glob_pattern=corpus.file(number).name),
            DocumentTokenizer(str(output), tokenizer_name_or_path=str(corpus.tokenizer), shuffle_documents=False,
                              eos_token="<|endoftext|>"),
        ],
        tasks=1, workers=1, logging_dir=f"{output}-logs", skip_completed=False,
    ).run()  # fmt: skip
    rate = corpus.part_megabytes(number) / (time.perf_counter() - start)
    (file,) = output.rglob("*.ds")
    corpus.check("datatrove", np.fromfile(file, np.uint16), np.fromfile(f"{file}.index", np.uint64), number)
    return rate


def one_round(corpus: Corpus, number: int, folder: Path) -> dict[str, float]:
    """MB/s of each way in one round."""
    folder.mkdir()
    rates: dict[str, float] = {}
    texts = corpus.texts[number]
    for workers in WORKERS:
        seconds = raw_seconds(texts[::2], corpus.tokenizer, workers)
        rates[f"hf, {workers}"] = command(corpus, folder / "hf", workers, "hf")
        seconds += raw_seconds(texts[1::2], corpus.tokenizer, workers)
        rates[f"raw, {workers}"] = corpus.part_megabytes(number) / seconds
        rates[f"gigatoken, {workers}"] = command(corpus, folder / "gigatoken", workers, "gigatoken")
    rates["datatrove, 1"] = datatrove(corpus, number, folder / "datatrove")
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5, help="200 MB take some 2 minutes each (default: 5)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, alone():
        folder = Path(name)
        corpus = Corpus.write(folder, args.megabytes, args.rounds)
        import datatrove.pipeline.tokens  # noqa: F401  its imports are not what is measured

        rounds = []
        for number in range(args.rounds):
            rounds.append(one_round(corpus, number, folder / str(number)))
            show(f"round {number + 1} (workers):", rounds[-1], "MB/s")
    tokens = sum(map(len, corpus.documents))
    rates = {way: statistics.median(each[way] for each in rounds) for way in rounds[0]}
    show(f"{corpus.megabytes:.0f} MB, {tokens:,} tokens, the same by all; medians (workers):", rates, "MB/s")

    def ratio(way: str, other: str, times: int = 1) -> float:
        return statistics.median(each[way] / each[other] / times for each in rounds)

    fast = {n: ratio(f"gigatoken, {n}", "datatrove, 1", n) for n in WORKERS}
    bare = {n: ratio(f"hf, {n}", f"raw, {n}") for n in WORKERS}
    met = [verdict(value, DATATROVE_BAR, f"gigatoken against datatrove, workers: {n}") for n, value in fast.items()]
    met += [verdict(value, RAW_BAR, f"hf engine against raw, workers: {n}") for n, value in bare.items()]
    sys.exit(not all(met))


if __name__ == "__main__":
    main()
