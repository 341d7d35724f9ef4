"""Progress on standard error: a bar on a terminal, plain lines when piped."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from megastage.logs import bar_size

_LINE_EVERY_S = 10.0


class Progress:
    """Counts bytes towards a total; shows MB/s and the time left."""

    def __init__(self, total_bytes: int, what: str) -> None:
        self._total, self._what = total_bytes, what
        self._done = 0
        self._start = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, **bar_size())

    def set(self, done_bytes: int) -> None:
        """Note that `done_bytes` in all are done."""
        done_bytes = min(done_bytes, self._total)
        if self._bar is not None:
            self._bar.update(done_bytes - self._done)
        self._done = done_bytes
        now = time.monotonic()
        if self._bar is None and now - self._last >= _LINE_EVERY_S:
            self._last = now
            self._line(now)

    def add(self, more_bytes: int) -> None:
        self.set(self._done + more_bytes)

    def _line(self, now: float) -> None:
        rate = self._done / (now - self._start)
        left = f"{(self._total - self._done) / rate:,.0f} s left" if rate else "no estimate yet"
        share = 100 * self._done / self._total if self._total else 100
        note = f"{self._what}: {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB ({share:.0f} %), "
        print(f"{note}{rate / 1e6:.2f} MB/s, {left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
