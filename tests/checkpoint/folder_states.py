"""States whose every value is their step, and folders of them: shared by the tests of the manager."""

from pathlib import Path

import torch

from megastage.checkpoint.manager import CheckpointManager

ASYNC = ["disabled", "async", "async_with_pinned_mem"]


def state_at(step: int, n: int = 1000) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((n,), float(step)), "optimizer.exp_avg.w": torch.full((n,), -float(step))}


def loaded(manager: CheckpointManager, load_step: int = -1) -> int | None:
    """The step that a run would resume from, with its values proved to be of that step."""
    out = state_at(-1)
    found = manager.load_newest(out, load_step)
    if found is None:
        return None
    step, train_state = found
    assert train_state == {"step": step}
    assert all(torch.equal(out[k], v) for k, v in state_at(step).items())
    return step


def fill(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(step, state_at(step), {"step": step})
    manager.wait()


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def harm(folder: Path, position: int = -5) -> None:
    path = folder / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
