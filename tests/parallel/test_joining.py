"""Starts of one job that share a store: each finds its own ranks, whatever earlier ones have left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from training import TINY, records, write_nanoset

from megastage.joining import join
from ranks import free_port

PATIENCE = timedelta(seconds=20)


def _start(store: dist.Store, ranks: range, world: int) -> list[tuple[str, int]]:
    def late(rank: int) -> tuple[str, int]:
        time.sleep(random.Random(rank).uniform(0, 0.1))
        return join(store, rank, world, PATIENCE)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(late, ranks))


def test_every_start_has_a_name_of_its_own_that_its_ranks_share():
    store = dist.HashStore()
    assert _start(store, range(5), 5) == [("start1", 0)] * 5
    assert _start(store, range(3), 3) == [("start2", 1)] * 3  # fewer nodes are left
    assert _start(store, range(5), 5) == [("start3", 2)] * 5
    assert join(store, 0, 1, PATIENCE) == ("start4", 3)


def test_what_ranks_left_that_died_while_they_joined_misleads_nobody():
    store = dist.HashStore()
    for rank in (1, 2):
        store.set(f"join/{rank}", f"of the dead {rank}")  # and rank 0 never came
    assert _start(store, range(3), 3) == [("start1", 0)] * 3
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(join, store, 1, 3, PATIENCE)
        with pytest.raises(RuntimeError, match=r"ranks \[2\] did not join within comm.init_timeout_seconds = 0.5"):
            join(store, 0, 3, timedelta(seconds=0.5))
    assert other.result() == ("start2", 1)
    assert _start(store, range(3), 3) == [("start3", 2)] * 3


def _launch(port: int, argv: list[str]) -> subprocess.Popen[bytes]:
    """torchrun as on one of two nodes, with one rank."""
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "job",
        "--rdzv-endpoint", f"127.0.0.1:{port}", "--nproc-per-node", "1", "--max-restarts", "3", "pretrain.py",
    ]  # fmt: skip
    return subprocess.Popen([*launcher, *argv], cwd=Path(__file__).parents[2], start_new_session=True)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_a_rank_killed_on_either_of_two_nodes_comes_back(node, tmp_path):
    """Where the other node notices the restart before its own rank has failed, torchrun's counts differ."""
    data = write_nanoset(tmp_path / "data", 60_000, 1)
    argv = [
        *TINY, "--training.dataset_type", "nanoset", "--training.dataset_path", str(data), "--training.steps", "60",
        "--training.seq_len", "64", "--training.local_batch_size", "1", "--checkpoint.enable",
        "--checkpoint.interval", "2", "--job.dump_folder", str(tmp_path / "out"),
    ]  # fmt: skip
    port = free_port()
    nodes = [_launch(port, argv), _launch(port, argv)]
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "checkpoint" / "step-4").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = Path(f"/proc/{nodes[node].pid}/task/{nodes[node].pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        assert [launcher.wait(timeout=120) for launcher in nodes] == [0, 0]
    finally:
        for launcher in nodes:
            if launcher.poll() is None:
                os.kill(launcher.pid, signal.SIGTERM)
    assert [r["step"] for r in records(["--job.dump_folder", str(tmp_path / "out")])] == list(range(1, 61))
