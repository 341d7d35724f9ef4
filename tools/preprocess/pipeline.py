"""The `tokenize` command: text files to one data set, restartable at any moment."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import tokenizers

from megastage.data import long_text, packed_memmap
from megastage.data.durable import check_target
from megastage.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from megastage.data.tokenizer_fast import SAMPLE_CHARACTERS, EngineError, choose_engine

from . import nanoset
from .inputs import InputError, InputFile, Part, Piece, find_files, plan_pieces
from .nanoset import NanosetWriter
from .pool import run_pieces
from .progress import Progress
from .readers import BadLine, Document, read_part
from .shards import Settings, ShardFacts, finished_shard, shard_documents

WRITERS = {"packed_memmap": packed_memmap.PackedMemmapWriter, "nanoset": NanosetWriter}
OURS = {"packed_memmap": packed_memmap.is_ours, "nanoset": nanoset.is_ours}


def run(options: Namespace) -> int:
    """Tokenize `options.inputs` into `options.output`; returns the exit code."""
    start = time.monotonic()
    check_target(Path(options.output), overwrite=options.overwrite, is_ours=OURS[options.format])
    files = find_files(options.inputs, text_lines=options.txt_lines)
    pieces = plan_pieces(files, options.text_field)
    with _WorkFolder(Path(options.output)) as work:
        tokenizer, tokenizer_path = _tokenizer(options, files, work.path)
        eos_id = _eos_id(options, tokenizer)
        sample = sample_texts(files, options.text_field, SAMPLE_CHARACTERS, skip_bad=True)
        encoder, engine = choose_engine(options.engine, tokenizer, sample)
        settings = Settings(
            work_folder=os.fspath(work.path),
            tokenizer_path=tokenizer_path,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=eos_id,
            text_field=options.text_field,
            skip_bad=options.skip_bad,
            library_version=tokenizers.__version__,
            engine="hf" if encoder is tokenizer else "gigatoken",
        )
        try:
            shards = _make_shards(pieces, settings, options.workers)
        except EngineError as error:
            if options.engine != "auto":
                raise
            print(f"{error}: that is done now", flush=True)
            settings, engine = replace(settings, engine="hf"), f"tokenizers ({error})"
            shards = _make_shards(pieces, settings, options.workers)
        total = ShardFacts()
        for piece in pieces:
            total.add(shards[piece.index])
        if not total.tokens:
            raise InputError(_nothing(total, files))
        _assemble(options, settings, pieces, tokenizer, total)
        work.remove()
    _summary(options, files, total, tokenizer, eos_id, engine, time.monotonic() - start)
    return 0


def _tokenizer(options: Namespace, files: Sequence[InputFile], work: Path) -> tuple[Tokenizer, str]:
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer), options.tokenizer
    path = work / "tokenizer.json"
    print(f"training a tokenizer of {options.train_tokenizer:,} entries", flush=True)
    texts = sample_texts(files, options.text_field, options.train_bytes, skip_bad=options.skip_bad)
    tokenizer = train_bpe(texts, options.train_tokenizer, path)
    # Named by its content: its path is that of a folder which is about to go.
    tokenizer.name = f"bpe{options.train_tokenizer}-{tokenizer.sha256[:8]}"
    return tokenizer, os.fspath(path)


def sample_texts(files: Sequence[InputFile], text_field: str, limit_bytes: int, *, skip_bad: bool) -> Iterator[str]:
    """Texts to train a tokenizer on: the beginning of every file, each by its share of `limit_bytes`."""
    total = sum(file.size_bytes for file in files) or 1
    for file in files:
        left = limit_bytes if total <= limit_bytes else max(1, limit_bytes * file.size_bytes // total)
        for part in (part for piece in plan_pieces([file], text_field) for part in piece.parts):
            for text in _texts(part, text_field, skip_bad):
                yield text
                left -= len(text)
                if left <= 0:
                    break
            if left <= 0:
                break


def _texts(part: Part, text_field: str, skip_bad: bool) -> Iterator[str]:
    for item in read_part(part, text_field, lambda _: None):
        if isinstance(item, BadLine):
            if not skip_bad:
                raise item.error()
        elif isinstance(item, Document):
            yield from item.chunks
        else:
            size = long_text.LONG_CHARACTERS
            yield from (item[i : i + size] for i in range(0, len(item), size))


def _eos_id(options: Namespace, tokenizer: Tokenizer) -> int | None:
    if options.no_eos:
        return None
    eos_id = tokenizer.eos_id if options.eos is None else tokenizer.token_id(options.eos)
    if eos_id is None:
        raise InputError(
            f"{options.tokenizer}: this tokenizer names no end-of-document token; give one with --eos (a token or an "
            "id), or --no-eos to append none"
        )
    return eos_id


def _make_shards(pieces: Sequence[Piece], settings: Settings, workers: int) -> dict[int, ShardFacts]:
    done = {piece.index: facts for piece in pieces if (facts := finished_shard(settings, piece)) is not None}
    todo = [piece for piece in pieces if piece.index not in done]
    if done:
        print(f"going on with an earlier run: {len(done)} of {len(pieces)} pieces are done", flush=True)
    progress = Progress(sum(piece.cost_bytes for piece in todo), "tokenize")
    try:
        return done | run_pieces(todo, settings, workers, progress.set)
    finally:
        progress.close()


def _assemble(
    options: Namespace, settings: Settings, pieces: Sequence[Piece], tokenizer: Tokenizer, total: ShardFacts
) -> None:
    """Copy all shards into the data set, in the order of the plan."""
    writer = WRITERS[options.format](
        options.output,
        packed_memmap.token_dtype(settings.vocab_size),
        eos_id=settings.eos_id,
        tokenizer=tokenizer.facts,
        tokenizer_json=tokenizer.to_json(),
        overwrite=options.overwrite,
    )
    progress = Progress(total.tokens * settings.dtype.itemsize, "write")
    try:
        for piece in pieces:
            for tokens, lengths in shard_documents(settings, piece.index):
                writer.extend(tokens, lengths)
                progress.add(tokens.nbytes)
        writer.finish()
    except BaseException:
        writer.abort()
        raise
    finally:
        progress.close()


def _nothing(total: ShardFacts, files: Sequence[InputFile]) -> str:
    found = f"{total.empty_documents} empty documents, {total.bad} bad lines"
    examples = "".join(f"\n  {example}" for example in total.examples[:3])
    return f"{files[0].path}{' and others' if len(files) > 1 else ''}: no text found ({found}){examples}"


def _summary(
    options: Namespace,
    files: Sequence[InputFile],
    total: ShardFacts,
    tokenizer: Tokenizer,
    eos_id: int | None,
    engine: str,
    seconds: float,
) -> None:
    size = sum(entry.stat().st_size for entry in os.scandir(options.output))
    dtype = packed_memmap.token_dtype(tokenizer.vocab_size)
    rows = [
        ("output", f"{options.output} ({options.format}, {size / 1e6:,.1f} MB)"),
        ("input", f"{len(files):,} files, {total.text_bytes / 1e6:,.1f} MB of text"),
        ("tokenizer", f"{tokenizer.name}, {tokenizer.vocab_size:,} entries, {dtype}"),
        ("engine", engine),
        ("end of document", "not appended" if eos_id is None else f"id {eos_id}, {tokenizer.decode([eos_id])!r}"),
        ("documents", f"{total.documents:,} ({total.empty_documents:,} empty ones left out)"),
        ("tokens", f"{total.tokens:,}"),
        ("tokens per document", f"{total.tokens / total.documents:,.1f}"),
        ("bytes per token", f"{total.text_bytes / total.tokens:.3f}"),
        ("bad lines", f"{total.bad:,}"),
        ("time", f"{seconds:,.1f} s, {total.text_bytes / 1e6 / seconds:,.2f} MB/s"),
    ]
    for name, value in rows:
        print(f"{name + ':':<21}{value}")
    for example in total.examples:
        print(f"  left out {example}")
    if total.bad > len(total.examples):
        print(f"  and {total.bad - len(total.examples):,} more")


class _WorkFolder:
    """`.NAME.work` beside the output, held by one process at a time; kept with finished pieces when the run fails."""

    def __init__(self, output: Path) -> None:
        output = Path(os.path.abspath(output))
        self.path = output.with_name(f".{output.name}.work")

    def __enter__(self) -> _WorkFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(f"{self.path}: another run is writing this output; wait for it or end it") from None
        for leftover in self.path.glob("*.tmp*"):
            leftover.unlink(missing_ok=True)
        return self

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        if not any(self.path.glob("*.json")):  # nothing to go on with
            self.remove()
        self._lock.close()
