"""`make demo`: real text of three domains, three stages, a kill, a resume that continues exactly, and a picture.

Everything comes from what is installed: no hub, no download. Needs 2 processes and a few minutes of CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("general", "math", "code")
EXACT = ("stage", "loss", "grad_norm", "lr", "tokens", "sample_digest")


def main(argv: list[str] | None = None) -> int:
    """Run the demo in `--output`; returns 0 when every claim it makes was checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "demo-out", help="folder for data, run and picture")
    parser.add_argument("--nproc", type=int, default=2, help="processes (data-parallel ranks)")
    parser.add_argument("--kill-at", type=int, default=110, help="step after which the run is killed")
    options = parser.parse_args(argv)
    began = time.monotonic()
    out: Path = options.output.resolve()
    run = out / "run"
    shutil.rmtree(run, ignore_errors=True)
    prepare(out)
    say(f"Training: general -> reasoning -> long_context, killed after step {options.kill_at}")
    before = train_and_kill(out, run, options.nproc, options.kill_at)
    say("Resuming: nothing to do by hand, the same command")
    subprocess.run(command(out, run, options.nproc), cwd=ROOT, check=True)
    records = read_records(run)
    redone = check_exact(before, records)
    check_falls(records)
    picture = run / "loss.png"
    subprocess.run([sys.executable, "-m", "tools.plot", str(run), "--output", str(picture)], cwd=ROOT, check=True)
    say(
        f"Done in {time.monotonic() - began:.0f} s: loss {records[0]['loss']:.2f} -> {records[-1]['loss']:.2f} over "
        f"{records[-1]['tokens']:,} tokens; {redone} updates done again after the kill were equal to the last bit; "
        f"picture: {picture}"
    )
    return 0


def say(text: str) -> None:
    """A headline between the outputs of the commands."""
    print(f"\n>>> {text}", flush=True)


def prepare(out: Path) -> None:
    """Text, tokenizer and packed data, each made once."""
    say("Real text from the installed packages: prose, mathematics, code")
    corpus, data = out / "corpus", out / "data"
    if not (corpus / "code").exists():
        subprocess.run([sys.executable, "-m", "tools.demo_corpus", str(corpus)], cwd=ROOT, check=True)
    tokenizer = out / "tokenizer.json"
    tool = [sys.executable, "-m", "tools.preprocess"]
    if not tokenizer.exists():
        say("A tokenizer trained on it")
        texts = [str(corpus / domain) for domain in DOMAINS]
        subprocess.run(
            [*tool, "train-tokenizer", *texts, "--vocab", "4096", "--output", str(tokenizer)], cwd=ROOT, check=True
        )
    for domain in DOMAINS:
        folder = data / domain
        if not (folder / "metadata.json").exists():
            say(f"Tokenizing {domain}")
            arguments = [str(corpus / domain), "--output", str(folder), "--tokenizer", str(tokenizer), "--workers", "2"]
            subprocess.run([*tool, *arguments], cwd=ROOT, check=True)


def command(out: Path, run: Path, nproc: int) -> list[str]:
    """The training command, as the README gives it."""
    folders = ",".join(str(out / "data" / domain) for domain in DOMAINS)
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc), "pretrain.py",
        "--config", "configs/demo.toml", "--job.dump_folder", str(run), "--training.dataset_folders", folders,
    ]  # fmt: skip


def train_and_kill(out: Path, run: Path, nproc: int, kill_at: int) -> list[dict[str, Any]]:
    """Start training and kill the whole job without warning after `kill_at` updates; its records until then."""
    process = subprocess.Popen(command(out, run, nproc), cwd=ROOT)
    while process.poll() is None:
        records = read_records(run)
        if records and records[-1]["step"] >= kill_at:
            kill_job(process.pid)
            process.wait()
            return read_records(run)
        time.sleep(0.1)
    raise SystemExit(f"training ended with code {process.returncode} before step {kill_at}")


def kill_job(launcher: int) -> None:
    """SIGKILL to the launcher and its workers at once, as when a node dies: nobody gets to clean up."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    job = [launcher]
    for process in job:  # grows while children are found
        job += [child for child, parent in parents.items() if parent == process]
    for process in job:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def read_records(run: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def check_exact(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> int:
    """Updates that the killed run had done beyond its last checkpoint were done again: compare them bit for bit."""
    saved = max(record["step"] for record in before if record["step"] % 50 == 0)
    redone = [record for record in before if record["step"] > saved]
    for old in redone:
        new = after[old["step"] - 1]
        for key in EXACT:
            if old[key] != new[key]:
                raise SystemExit(f"step {old['step']}: {key} was {old[key]} before the kill and is {new[key]} after")
    return len(redone)


def check_falls(records: list[dict[str, Any]]) -> None:
    """The loss must have fallen clearly."""
    first, last = (sum(r["loss"] for r in part) / len(part) for part in (records[:5], records[-5:]))
    if last > first - 2:
        raise SystemExit(f"the loss went from {first:.2f} to {last:.2f} only")


if __name__ == "__main__":
    sys.exit(main())
