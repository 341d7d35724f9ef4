"""Runs pieces on worker processes; the result depends on the plan alone."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megastage.data.tokenizer import Tokenizer, load_tokenizer

from .encode import encode_piece
from .inputs import InputError, Piece
from .shards import Settings, ShardFacts

_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1


class _Worker:
    """What a worker process keeps between pieces."""

    settings: Settings
    tokenizer: Tokenizer
    counter: Any


def run_pieces(
    pieces: Sequence[Piece], settings: Settings, workers: int, on_bytes: Callable[[int], None]
) -> dict[int, ShardFacts]:
    """Make the shards of all pieces; `on_bytes` is told the input bytes read so far.

    Raises the first error that a worker meets; finished shards stay for the next run.
    """
    if workers == 1 or len(pieces) == 1:
        return _run_here(pieces, settings, on_bytes)
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(
        min(workers, len(pieces)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(settings, counter, os.getpid()),
    )
    try:
        return _collect(pool, pieces, workers, lambda: on_bytes(counter.value))
    except BrokenProcessPool:
        raise InputError(
            "a worker process died, most likely for want of memory; run the same command again with fewer --workers: "
            "finished pieces are kept"
        ) from None
    finally:
        _stop(pool)


def _collect(
    pool: ProcessPoolExecutor, pieces: Sequence[Piece], workers: int, poll: Callable[[], None]
) -> dict[int, ShardFacts]:
    results: dict[int, ShardFacts] = {}
    waiting = iter(pieces)
    running: dict[Future[ShardFacts], int] = {}
    while True:
        for piece in itertools.islice(waiting, 2 * workers - len(running)):
            with _interrupts_blocked():
                running[pool.submit(_work, piece)] = piece.index
        if not running:
            return results
        done, _ = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=running.__getitem__):
            results[running.pop(future)] = future.result()
        poll()


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, not even while they start: ending them is the parent's part.

    The parent itself gets a Ctrl-C that falls inside as soon as this is over.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the workers at once: after an error nothing of what they still do is wanted."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _run_here(pieces: Sequence[Piece], settings: Settings, on_bytes: Callable[[int], None]) -> dict[int, ShardFacts]:
    tokenizer = _load(settings)
    done = 0
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def count(more: int) -> None:
        nonlocal done
        done += more
        on_bytes(done)

    try:
        return {piece.index: encode_piece(piece, settings, tokenizer, count) for piece in pieces}
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _load(settings: Settings) -> Tokenizer:
    tokenizer = load_tokenizer(settings.tokenizer_path)
    if tokenizer.sha256 != settings.tokenizer_sha256:
        raise InputError(f"{settings.tokenizer_path}: changed while it was being used; run the same command again")
    return tokenizer


def _start_worker(settings: Settings, counter: Any, parent: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker
    _die_with(parent)
    _Worker.settings, _Worker.counter = settings, counter
    _Worker.tokenizer = _load(settings)


def _die_with(parent: int) -> None:
    """End this process when its parent is gone, even by SIGKILL: at once on Linux, else within a second."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(piece: Piece) -> ShardFacts:
    def count(more: int) -> None:
        with _Worker.counter.get_lock():
            _Worker.counter.value += more

    return encode_piece(piece, _Worker.settings, _Worker.tokenizer, count)
