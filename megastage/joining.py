"""How the ranks of one start of a job find each other, and not what an earlier start left in the store they share.

torchrun keeps one store over all restarts, and says to each node how often it was restarted by its own count: where a
node's worker failed it counts, where a node only followed it does not. So the ranks agree on a name by themselves.
"""

from __future__ import annotations

import secrets
import time
from datetime import timedelta

import torch.distributed as dist

_POLL_S = 0.02


def join(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> tuple[str, int]:
    """A name that all ranks of this start have, and those of no other one; how many starts came before, in this store.

    Rank 0 counts the starts. Every other rank leaves a token of its own; rank 0 answers each token that it finds, those
    of dead processes too, until all ranks have taken an answer. Raises RuntimeError naming the ranks that don't come.
    """
    if rank > 0:
        token = secrets.token_hex(16)
        store.set(f"join/{rank}", token)
        name = store.get(f"welcome/{token}").decode()
        store.set(f"{name}/joined/{rank}", "1")
    else:
        name = f"start{store.add('starts', 1)}"
        _welcome(store, name, set(range(1, world_size)), timeout)
    return name, int(name.removeprefix("start")) - 1


def _welcome(store: dist.Store, name: str, missing: set[int], timeout: timedelta) -> None:
    answered: set[bytes] = set()
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        missing = {rank for rank in missing if not store.check([f"{name}/joined/{rank}"])}
        if not missing:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"ranks {sorted(missing)} did not join within comm.init_timeout_seconds = {timeout.total_seconds():g}"
            )
        for rank in missing:
            if store.check([f"join/{rank}"]) and (token := store.get(f"join/{rank}")) not in answered:
                store.set(f"welcome/{token.decode()}", name)
                answered.add(token)
        time.sleep(_POLL_S)
