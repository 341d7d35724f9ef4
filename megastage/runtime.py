"""Process groups and devices, chosen once at start: NCCL on CUDA, gloo on CPU, one code path for both.

One process without torchrun is a world of one: everything downstream may use collectives freely.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megastage.joining import join
from megastage.logs import log

LONG_S = 1800  # for what one rank does while the others wait: reading an index, writing files


@dataclass
class Runtime:
    """Where this process stands. `control` is a gloo group of all ranks for small CPU tensors and agreement;
    `checkpoint` is another, so that a save in the background never interleaves with training's collectives.
    `store` is a few keys that all ranks share, also when their connections are gone."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup
    checkpoint: dist.ProcessGroup
    store: dist.Store
    restarts: int = 0  # how often torchrun has started the ranks of this run anew
    stop_signal: int = 0
    _old_handlers: dict[int, object] = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        """Rank 0 prints and writes."""
        return self.rank == 0

    def watch_signals(self) -> None:
        """Turn SIGTERM and SIGUSR1 into a request to save and leave after the current step."""

        def request(signum: int, _frame: FrameType | None) -> None:
            self.stop_signal = signum

        for signum in (signal.SIGTERM, signal.SIGUSR1):
            self._old_handlers[signum] = signal.signal(signum, request)

    def set_timeout(self, seconds: float) -> None:
        """The timeout of every collective of training from here on; `control` and `checkpoint` keep their long one."""
        for group in list(distributed_c10d._world.pg_map):
            if group is not self.control and group is not self.checkpoint:
                distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def close(self, *, failed: bool = False) -> None:
        """Leave together: a rank that tears its groups down early can fail its peers' last collective.

        A rank that failed doesn't wait for the others, which may never come.
        """
        for signum, handler in self._old_handlers.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._old_handlers.clear()
        if dist.is_initialized() and not failed:
            dist.barrier(group=self.control)
            dist.destroy_process_group()


def start(init_timeout_s: float = 300, train_timeout_s: float = 100, *, device_type: str | None = None) -> Runtime:
    """Join the job described by torchrun's environment (or a world of one) and make the two gloo groups.

    Raises RuntimeError when CUDA is asked for and absent.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("device cuda was asked for, but torch sees none: run on a GPU machine or on cpu")
        if local_rank >= torch.cuda.device_count():
            raise RuntimeError(
                f"LOCAL_RANK={local_rank}, but this node has {torch.cuda.device_count()} CUDA devices: "
                "start torchrun with --nproc-per-node of at most that"
            )
        torch.cuda.set_device(local_rank)
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device("cpu")
    store, restarts = _init_process_group(device, timedelta(seconds=init_timeout_s))
    long_timeout = timedelta(seconds=max(init_timeout_s, train_timeout_s, LONG_S))
    control = dist.new_group(backend="gloo", timeout=long_timeout)
    checkpoint = dist.new_group(backend="gloo", timeout=long_timeout)
    count = torch.tensor([max(restarts, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))])
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=control)
    return Runtime(
        dist.get_rank(), dist.get_world_size(), local_rank, device, control, checkpoint, store, int(count.item())
    )


def _init_process_group(device: torch.device, timeout: timedelta) -> tuple[dist.Store, int]:
    """Join the ranks of this start; the store that only they use, and how many starts came before in the job's."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    if "RANK" not in os.environ:
        alone = dist.HashStore()
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, device_id=device_id)
        return alone, 0
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    name, restarts = join(store, rank, world_size, timeout)
    prefixed = dist.PrefixStore(name, store)  # without it, gloo meets the addresses of a dead start
    dist.init_process_group(
        backend, store=prefixed, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
    )
    return prefixed, restarts


def make_writable(path: str, key: str, is_main: bool) -> None:
    """Make the folder that `key` names, on rank 0. Raises ValueError where it can't be made or written to."""
    if not is_main:
        return
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f'{key} = "{path}": can\'t be written to ({error.strerror}); name a folder that this user may write to'
        ) from None


def seed_everything(seed: int) -> None:
    """Seed the process's generators. Weights and data are seeded by name and position, independent of these."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_deterministic(enabled: bool, warn_only: bool = False) -> None:
    """Ask for bit-reproducible kernels and collectives. Call before `start`: cuBLAS and NCCL read the environment once.

    NCCL's reductions inside the switch (NVLink SHARP) add in an order that isn't fixed; its rings and trees do.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


def collect_young(*, report: bool) -> None:
    """Collect the two young generations of objects; `report` logs how many were garbage and how long it took."""
    began = time.perf_counter()
    found = gc.collect(1)
    if report:
        log.info("Garbage collection: %d objects in %.1f ms", found, (time.perf_counter() - began) * 1e3)


def record_collectives(entries: int, folder: Path, prefix: str) -> None:
    """Have torch's flight recorder keep the last `entries` collectives, and write them to FOLDER/PREFIX<rank> on a
    timeout. Call before `start`; what already stands in the environment is left as it is. entries 0: off."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(entries))
    if entries == 0:
        return
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(folder / prefix))
    if torch.cuda.is_available():
        folder.mkdir(parents=True, exist_ok=True)


def collect_garbage(device: torch.device) -> None:
    """Free what reference cycles and the caching allocator still hold: done at stage boundaries."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
