"""Runs pieces on worker processes; the result depends on the plan alone."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from typing import Any

from megastage.data.tokenizer import Tokenizer, load_tokenizer
from megastage.data.tokenizer_fast import FastTokenizer

from .encode import encode_piece
from .inputs import InputError, Piece
from .shards import Settings, ShardFacts

_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1
_GONE = (
    "a worker process died, most likely for want of memory; run the same command again with fewer --workers: finished "
    "pieces are kept"
)


def run_pieces(
    pieces: Sequence[Piece], settings: Settings, workers: int, on_bytes: Callable[[int], None]
) -> dict[int, ShardFacts]:
    """Make the shards of all pieces; `on_bytes` is told the input bytes read so far.

    Raises the first error that a worker meets; finished shards stay for the next run.
    """
    if workers == 1 or len(pieces) <= 1:
        return _run_here(pieces, settings, on_bytes)
    context = multiprocessing.get_context("spawn")
    counters = context.RawArray("q", min(workers, len(pieces)))  # input bytes read, one element a worker: no lock
    team: list[_Worker] = []
    resource_tracker.ensure_running()  # its start, part of a first worker's start otherwise, unblocks interrupts
    try:
        for rank in range(len(counters)):
            with _interrupts_blocked():
                team.append(_Worker(context, settings, counters, rank))
        return _deal(pieces, team, lambda: on_bytes(sum(counters)))
    finally:
        for worker in team:
            worker.stop()


class _Worker:
    """A worker process and the pipe to it; each has its own, so the end of either process closes it."""

    def __init__(self, context: SpawnContext, settings: Settings, counters: Any, rank: int) -> None:
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings, counters, rank), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, piece: Piece) -> None:
        """Give the worker a piece. Raises InputError when the process is gone."""
        try:
            self.pipe.send(piece)
        except ConnectionError:
            raise InputError(_GONE) from None

    def receive(self) -> ShardFacts:
        """The answer to the piece sent last. Raises what the worker raised, InputError when the process is gone."""
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise InputError(_GONE) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def stop(self) -> None:
        """End the process at once: after an error nothing of what it still does is wanted."""
        self._process.terminate()
        self._process.join()
        self.pipe.close()


def _deal(pieces: Sequence[Piece], team: Sequence[_Worker], poll: Callable[[], None]) -> dict[int, ShardFacts]:
    """Give each worker a piece, and another whenever it has finished one."""
    results: dict[int, ShardFacts] = {}
    waiting = iter(pieces)
    busy: dict[Connection, tuple[_Worker, int]] = {}
    for worker, piece in zip(team, waiting, strict=False):
        worker.send(piece)
        busy[worker.pipe] = (worker, piece.index)
    while busy:
        for pipe in wait(list(busy), timeout=_POLL_S):
            assert isinstance(pipe, Connection)
            worker, index = busy.pop(pipe)
            results[index] = worker.receive()
            following = next(waiting, None)
            if following is not None:
                worker.send(following)
                busy[pipe] = (worker, following.index)
        poll()
    return results


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
    return FastTokenizer(tokenizer) if settings.engine == "gigatoken" else tokenizer


def _serve(pipe: Connection, settings: Settings, counters: Any, rank: int) -> None:
    """A worker's life: pieces come in, shard facts or the error go out, until the pipe is closed."""
    with contextlib.suppress(OSError, AttributeError):
        # On Linux a worker ends with its parent even in the middle of a piece; elsewhere after it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker

    def count(more: int) -> None:
        counters[rank] += more

    with contextlib.suppress(EOFError, ConnectionError):
        tokenizer: Tokenizer | None = None
        while True:
            piece = pipe.recv()
            try:
                tokenizer = tokenizer or _load(settings)
                answer: Any = encode_piece(piece, settings, tokenizer, count)
            except (ValueError, OSError) as error:
                answer = error
            except Exception:
                answer = RuntimeError(f"in a worker:\n{traceback.format_exc()}")
            pipe.send(answer)
