"""How fast a checkpoint is saved and loaded, as ratios to raw writes of the same bytes and to torch's dcp.save.

Run:  python benchmarks/checkpoint_rate.py [--mib 512] [--ranks 4] [--rounds 3] [--folder DIR]
Rounds are interleaved and the best of each is reported, since disks and neighbours are noisy; compare ratios of one
run only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from megastage.checkpoint.manager import CheckpointManager
from ranks import run_ranks


def timed(action: Callable[[], object]) -> float:
    """Seconds until every rank is done."""
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


def raw(path: Path, tensors: dict[str, torch.Tensor], checksum: bool = False) -> None:
    """The floor: one new file a rank, written and fsynced; with CRC32 on request."""
    with open(path, "xb", buffering=0) as file:
        for tensor in tensors.values():
            view = memoryview(tensor.view(torch.uint8).numpy().data)
            for start in range(0, len(view), 8 << 20):
                if checksum:
                    zlib.crc32(view[start : start + (8 << 20)])
                file.write(view[start : start + (8 << 20)])
        os.fsync(file.fileno())


def measure(folder: str, mib: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by name, on this rank."""
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    root = Path(folder)
    shape = (mib * (1 << 20) // world // 8 // 4,)
    tensors = {f"model.{rank}.{i}": torch.randn(shape) for i in range(8)}
    blank = {key: torch.zeros_like(value) for key, value in tensors.items()}
    manager = CheckpointManager(root / "ours", group=group, keep_latest_k=0)
    background = CheckpointManager(
        root / "async", group=dist.new_group(backend="gloo"), async_mode="async", keep_latest_k=0
    )
    seconds: dict[str, list[float]] = {}
    for step in range(rounds + 1):  # the first warms up

        def note(name: str, action: Callable[[], object], step: int = step) -> None:
            if step:
                seconds.setdefault(name, []).append(timed(action))
            else:
                timed(action)

        files = [root / f"{name}-{rank}" for name in ("raw", "crc")]
        note("raw", lambda path=files[0]: raw(path, tensors))
        note("raw + CRC32", lambda path=files[1]: raw(path, tensors, checksum=True))
        for path in files:
            path.unlink()
        note("save", lambda s=step: manager.save(s, tensors, {}))
        note("dcp.save", lambda s=step: dcp.save(tensors, checkpoint_id=root / f"dcp-{s}", process_group=group))
        note("async stall", lambda s=step: background.save(s, tensors, {}))
        background.wait()
        note("load", lambda s=step: manager.load(s, blank))
        note("dcp.load", lambda s=step: dcp.load(blank, checkpoint_id=root / f"dcp-{s}", process_group=group))
        if rank == 0:
            for path in (root / f"dcp-{step}", *(root / kind / f"step-{step}" for kind in ("ours", "async"))):
                shutil.rmtree(path)
        dist.barrier()
    dist.destroy_process_group()
    return seconds


def main() -> None:
    """Print one line per method: best seconds, MiB/s and the ratio to raw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="size of the checkpoint over all ranks")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        seconds = run_ranks(args.ranks, measure, folder, args.mib, args.rounds)[0]
    best = {name: min(values) for name, values in seconds.items()}
    print(f"{args.mib} MiB over {args.ranks} ranks, best of {args.rounds}; ratio: rate against raw write + fsync")
    for name, value in best.items():
        print(f"{name:12s} {value:7.3f} s {args.mib / value:8.0f} MiB/s   ratio {best['raw'] / value:5.2f}")


if __name__ == "__main__":
    main()
