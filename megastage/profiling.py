"""Traces of torch.profiler and snapshots of CUDA memory, every profiling.profile_freq updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megastage.config.schema import Config
from megastage.logs import log
from megastage.runtime import Runtime

_HISTORY_ENTRIES = 100_000  # of the allocator, enough for a few steps of a large model


class Profiling:
    """What [profiling] asks for; `step()` after every update. Each rank writes its own files, per finished update N:
    FOLDER/step-N/rank-R.json (open it in ui.perfetto.dev) and FOLDER/step-N/rank-R.pickle (pytorch.org/memory_viz).

    Raises ValueError for memory snapshots without CUDA.
    """

    def __init__(self, cfg: Config, rt: Runtime, done_steps: int) -> None:
        self.cfg, self.rt, self.done_steps = cfg, rt, done_steps
        table = cfg.profiling
        if table.enable_memory_snapshot and rt.device.type != "cuda":
            raise ValueError("profiling.enable_memory_snapshot = true: there is no CUDA memory on this device")
        self.profiler = self._make_profiler() if table.enable_profiling else None

    def start(self) -> None:
        """Begin to count updates."""
        if self.profiler is not None:
            self.profiler.start()
        if self.cfg.profiling.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES)

    def step(self) -> None:
        """An update is done: write what is due."""
        self.done_steps += 1
        if self.profiler is not None:
            self.profiler.step()
        if self.cfg.profiling.enable_memory_snapshot and self.done_steps % self.cfg.profiling.profile_freq == 0:
            self._write_snapshot(f"step-{self.done_steps}")

    def stop(self) -> None:
        """Stop recording; a trace that is not complete is dropped."""
        if self.profiler is not None:
            self.profiler.on_trace_ready = None
            self.profiler.stop()
        if self.cfg.profiling.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record within; where memory runs out, the last snapshot shows what filled it."""
        self.start()
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            if self.cfg.profiling.enable_memory_snapshot:
                self._write_snapshot(f"step-{self.done_steps}-out-of-memory")
            raise
        finally:
            self.stop()

    def _make_profiler(self) -> Any:
        table = self.cfg.profiling
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.rt.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        wait = table.profile_freq - table.profiler_active - table.profiler_warmup
        skipped = -self.done_steps % table.profile_freq if self.done_steps else 0  # traces end at multiples
        return torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                wait=wait, warmup=table.profiler_warmup, active=table.profiler_active, skip_first=skipped
            ),
            on_trace_ready=self._write_trace,
            record_shapes=True,
        )

    def _write_trace(self, profiler: Any) -> None:
        path = self._path(self.cfg.profiling.save_traces_folder, f"step-{self.done_steps}", "json")
        profiler.export_chrome_trace(str(path))
        log.info("Profile: %s", path)

    def _write_snapshot(self, name: str) -> None:
        path = self._path(self.cfg.profiling.save_memory_snapshot_folder, name, "pickle")
        torch.cuda.memory._dump_snapshot(str(path))
        log.info("Memory snapshot: %s", path)

    def _path(self, folder: str, name: str, suffix: str) -> Path:
        path = Path(self.cfg.job.dump_folder) / folder / name / f"rank-{self.rt.rank}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
