"""What a person sees: rank 0's lines, and a live bar when they look at a terminal."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

log = logging.getLogger("megastage")


class _BarSafeHandler(logging.StreamHandler):
    """Writes lines above a live tqdm bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)
        self.flush()


def setup(rank: int, stream: TextIO | None = None) -> None:
    """Rank 0 prints messages as they are; other ranks print warnings and errors only, with their rank."""
    handler = _BarSafeHandler(stream or sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)


_COLORS = {"step": 31, "loss": 32, "grad_norm": 33, "tokens/s": 34, "mfu": 35, "memory": 36}  # ANSI foregrounds


def colors_wanted(disabled: bool, stream: TextIO | None = None) -> bool:
    """Whether step lines are coloured: on a terminal, unless metrics.disable_color_printing or NO_COLOR say no."""
    return not disabled and "NO_COLOR" not in os.environ and (stream or sys.stdout).isatty()


def step_line(record: Mapping[str, Any], steps: int, *, colors: bool = False) -> str:
    """One line for a completed update; `record` is the object that goes into metrics.jsonl."""
    width = len(str(steps))
    parts = [
        f"step {record['step']:>{width}}/{steps}",
        f"stage {record['stage']}",
        f"loss {record['loss']:.4f}" if record["loss"] is not None else "loss n/a",
        f"grad_norm {record['grad_norm']:.4f}",
        f"lr {record['lr']:.3e}",
        f"tokens/s {record['tokens_per_s']:,.0f}",
        f"mfu {record['mfu'] * 100:.1f}%" if record.get("mfu") is not None else "mfu n/a",
        f"memory {record['memory_gib']:.2f}GiB",
        f"data_wait {record['data_wait_s'] * 1e3:.1f}ms",
    ]
    return "  ".join(map(_paint, parts)) if colors else "  ".join(parts)


def _paint(part: str) -> str:
    code = _COLORS.get(part.split()[0])
    return part if code is None else f"\x1b[{code}m{part}\x1b[39m"


def bar_size() -> dict[str, Any]:
    """tqdm's settings for a bar on standard error, a terminal; some, as under `script`, don't know their size."""
    sized = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    return {"dynamic_ncols": True} if sized else {"ncols": 100, "nrows": 24}


class Progress:
    """A bar over the steps of the run on a terminal; nothing when output is piped or on other ranks."""

    def __init__(self, done: int, total: int, *, enabled: bool) -> None:
        self.bar: tqdm[Any] | None = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, unit="step", leave=False, **bar_size())

    def update(self, record: Mapping[str, Any]) -> None:
        """Advance by one step and show its loss and stage."""
        if self.bar is not None:
            loss = "n/a" if record["loss"] is None else f"{record['loss']:.3f}"
            self.bar.set_postfix_str(f"{record['stage']} loss {loss}", refresh=False)
            self.bar.update(1)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
