"""Whole preprocessing runs over 200 MB of text, against the bare tokenizer, per core, and datatrove's pipeline.

    python benchmarks/preprocess.py [--megabytes 200] [--rounds 5]        (pip install gigatoken datatrove)

The text is the source code and docstrings that Python's packages bring, as JSON lines; the tokenizer is a byte-level
BPE of 8192 entries trained on it. Ours is the command over all of it: from the start of the process to its end, with
reading, writing and syncing, by 1 and by 2 workers. Raw is `encode_batch_fast` on texts that are in memory already,
on as many cores. The text lies in one file a round, all of one mixture since they take its documents in turn; a round
compares whole runs with the rates of raw and datatrove on one of the files, raw's half before a run and half after, so
that a machine that grows slower is slower for both. The medians of the rounds' ratios count. Two workers of datatrove
are taken to be twice as fast as one, which flatters it. Tokens and documents of all are compared. The ratios by
processor time stand beside those by the clock: on a machine that is not idle they are the steadier ones, but they leave
out what is spent waiting.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


@dataclass
class Time:
    """Seconds by the clock, and of processors over this process and those that it started and that have ended."""

    clock: float = 0.0
    processor: float = 0.0

    @contextmanager
    def added(self) -> Iterator[None]:
        clock, processor = time.perf_counter(), _processor_seconds()
        yield
        self.clock += time.perf_counter() - clock
        self.processor += _processor_seconds() - processor

    def rate(self, megabytes: float) -> Time:
        """MB/s by either."""
        return Time(megabytes / self.clock, megabytes / self.processor)


def _processor_seconds() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def command(corpus: Corpus, output: Path, workers: int, engine: str) -> Time:
    """MB/s of the whole command."""
    arguments = [corpus.folder, "--tokenizer", corpus.tokenizer, "--output", output, "--engine", engine]
    arguments += ["--workers", workers, "--overwrite"]
    taken = Time()
    with taken.added():
        subprocess.run(
            [sys.executable, "-m", "tools.preprocess", *map(str, arguments)], cwd=ROOT, check=True, capture_output=True
        )
    data = open_packed_memmap(output)
    corpus.check(f"{engine}, {workers} workers", data.tokens, data.doc_ends)
    return taken.rate(corpus.megabytes)


def raw(texts: list[str], tokenizer: Path, workers: int, taken: Time) -> None:
    """Adds what the bare tokenizer takes over the texts, each worker with its share in memory before the clock starts.

    The processor time is the workers' own, between the same two points.
    """
    context = multiprocessing.get_context("fork")
    gate, used = context.Barrier(workers + 1), context.Queue()
    arguments = [(texts[i::workers], tokenizer, gate, used) for i in range(workers)]
    team = [context.Process(target=_raw_worker, args=each) for each in arguments]
    for process in team:
        process.start()
    gate.wait()
    start = time.perf_counter()
    gate.wait()
    taken.clock += time.perf_counter() - start
    taken.processor += sum(used.get() for _ in team)
    for process in team:
        process.join()


def _raw_worker(texts: list[str], tokenizer: Path, gate: Any, used: Any) -> None:
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    engine = tokenizers.Tokenizer.from_file(str(tokenizer))
    gate.wait()
    start = time.process_time()
    for i in range(0, len(texts), BATCH):
        engine.encode_batch_fast(texts[i : i + BATCH], add_special_tokens=False)
    used.put(time.process_time() - start)
    gate.wait()


def datatrove(corpus: Corpus, number: int, output: Path) -> Time:
    """MB/s of datatrove's tokenizer pipeline with one worker, its imports not counted, over one file."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    taken = Time()
    with taken.added():
        LocalPipelineExecutor(
            [
                JsonlReader(str(corpus.folder), glob_pattern=corpus.file(number).name),
                DocumentTokenizer(str(output), tokenizer_name_or_path=str(corpus.tokenizer), shuffle_documents=False,
                                  eos_token="<|endoftext|>"),
            ],
            tasks=1, workers=1, logging_dir=f"{output}-logs", skip_completed=False,
        ).run()  # fmt: skip
    (file,) = output.rglob("*.ds")
    corpus.check("datatrove", np.fromfile(file, np.uint16), np.fromfile(f"{file}.index", np.uint64), number)
    return taken.rate(corpus.part_megabytes(number))


def one_round(corpus: Corpus, number: int, folder: Path) -> dict[str, Time]:
    """MB/s of each way in one round."""
    folder.mkdir()
    rates: dict[str, Time] = {}
    texts = corpus.texts[number]
    for workers in WORKERS:
        taken = Time()
        raw(texts[::2], corpus.tokenizer, workers, taken)
        rates[f"hf, {workers}"] = command(corpus, folder / "hf", workers, "hf")
        raw(texts[1::2], corpus.tokenizer, workers, taken)
        rates[f"raw, {workers}"] = taken.rate(corpus.part_megabytes(number))
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
            for measure in ("clock", "processor"):
                rates = {way: getattr(each, measure) for way, each in rounds[-1].items()}
                show(f"round {number + 1} by the {measure}, workers:", rates, "MB/s")
            sys.stdout.flush()
    tokens = sum(map(len, corpus.documents))
    medians = {way: statistics.median(each[way].clock for each in rounds) for way in rounds[0]}
    show(f"{corpus.megabytes:.0f} MB, {tokens:,} tokens, the same by all; medians, workers:", medians, "MB/s")

    def judge(way: str, other: str, bar: float, times: int = 1) -> bool:
        by = {
            name: statistics.median(getattr(each[way], name) / getattr(each[other], name) / scale for each in rounds)
            for name, scale in (("clock", times), ("processor", 1))
        }
        note = f"{way} workers, against {other}{f' times {times}' if times > 1 else ''}"
        return verdict(by["clock"], bar, f"{note}; by processor time {by['processor']:.2f}")

    met = [judge(f"gigatoken, {n}", "datatrove, 1", DATATROVE_BAR, n) for n in WORKERS]
    met += [judge(f"hf, {n}", f"raw, {n}", RAW_BAR) for n in WORKERS]
    sys.exit(not all(met))


if __name__ == "__main__":
    main()
