"""The numbers of a run: one JSON object a step in metrics.jsonl, and TensorBoard or Weights & Biases on request."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from megastage.logs import log


class Sink(Protocol):
    """A place metrics go to."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends to `path`. A resumed run first drops the records of updates that it is going to do again.

    rewound: the run goes another way from `done_steps`, as a fresh start does: the records so far are kept, in
    PATH.superseded-K.
    """

    def __init__(self, path: Path, done_steps: int, *, rewound: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _keep_until(path, done_steps, rewound=rewound or done_steps == 0)
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _keep_until(path: Path, done_steps: int, *, rewound: bool) -> None:
    """Rewrite the file without records beyond `done_steps`, and without a last line cut off by a kill.

    rewound: where there are such records, the file as it was is renamed.
    """
    kept, later = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            continue
        if record["step"] <= done_steps:
            kept.append(line)
        else:
            later += 1
    if rewound and later:
        aside = _free_name(path)
        os.rename(path, aside)
        log.info("%s of %d updates that are not gone on from: now %s", path.name, later, aside.name)
    partial = path.with_suffix(".jsonl.tmp")
    partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)


def _free_name(path: Path) -> Path:
    number = 1
    while (name := path.with_name(f"{path.name}.superseded-{number}")).exists():
        number += 1
    return name


def scalars(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a record but its step, those of nested objects as `outer/inner`."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and (prefix or key != "step"):
            found[prefix + key] = value
    return found


class TensorBoard:
    """Scalars under `folder`; needs the tensorboard extra. What a run is going to write again is hidden."""

    def __init__(self, folder: Path, done_steps: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "metrics.enable_tensorboard = true needs the tensorboard package: pip install 'megastage[tensorboard]'"
            ) from error
        self.writer = SummaryWriter(str(folder), purge_step=done_steps + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        for key, value in scalars(record).items():
            self.writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A Weights & Biases run; needs the wandb extra. Project and entity come from wandb's own environment variables."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise ValueError(
                "metrics.enable_wandb = true needs the wandb package: pip install 'megastage[wandb]'"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(dir=str(folder), config=dict(config))

    def write(self, record: Mapping[str, Any]) -> None:
        words = {key: value for key, value in record.items() if isinstance(value, str)}
        self.run.log({**words, **scalars(record)}, step=record["step"])

    def close(self) -> None:
        self.run.finish()


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: reserved by the allocator on CUDA, resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
