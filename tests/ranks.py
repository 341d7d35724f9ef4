"""Real ranks for tests: forked after torch is imported, joined over gloo, with torchrun's environment variables."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _child(rank: int, world: int, port: int, out: Connection, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    torch.set_num_threads(1)
    code = 0
    try:
        out.send(("ok", fn(*args)))
    except BaseException:
        out.send(("error", traceback.format_exc()))
        code = 1
    out.close()
    os._exit(code)


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
    """Call fn(*args) in `world` forked ranks; returns their results in rank order.

    A rank that raises fails the call at once with its traceback; the others are killed. Results must survive pickling:
    return numbers, strings or numpy arrays.
    """
    ctx = multiprocessing.get_context("fork")
    port = free_port()
    ranks, pipes = [], []
    gc.freeze()  # a collection in a child would otherwise go through, and so copy, all that the parent has imported
    for rank in range(world):
        receive, send = ctx.Pipe(duplex=False)
        process = ctx.Process(target=_child, args=(rank, world, port, send, fn, args), daemon=True)
        process.start()
        send.close()
        ranks.append(process)
        pipes.append(receive)
    gc.unfreeze()
    results: dict[int, Any] = {}
    try:
        while len(results) < world:
            ready = wait([p for i, p in enumerate(pipes) if i not in results], timeout=timeout_s)
            if not ready:
                raise TimeoutError(f"ranks {sorted(set(range(world)) - set(results))} gave no result in {timeout_s} s")
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    status, value = pipe.recv()
                except EOFError:
                    status, value = "error", "the process died without a result"
                if status == "error":
                    raise RuntimeError(f"rank {rank} of {world} failed:\n{value}")
                results[rank] = value
        for process in ranks:
            process.join(timeout=30)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world)]
