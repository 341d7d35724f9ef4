"""The live bar: on a terminal of any kind, and never where output is piped."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

RUN = """
from megastage import logs
logs.setup(0)
progress = logs.Progress(2, 4, enabled=True)
for step in (3, 4):
    progress.update({"stage": "general", "loss": 1.5})
    progress.bar and progress.bar.refresh()
    logs.log.info("step %d/4", step)
progress.close()
"""


def _on_a_terminal(columns: int) -> str:
    """What a terminal of so many columns shows; 0: one that doesn't know its size, as under `script`."""
    leader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", RUN], stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux tells that nobody writes any more
        while part := os.read(leader, 4096):
            shown += part
    os.close(leader)
    assert process.wait() == 0
    return shown.decode()


@pytest.mark.parametrize("columns", [0, 90])
def test_a_bar_on_a_terminal(columns: int) -> None:
    shown = _on_a_terminal(columns)
    assert "4/4" in shown
    assert "general loss 1.500" in shown
    lines = [line.rpartition("\r")[2] for line in shown.replace("\r\n", "\n").split("\n")]
    assert [line for line in lines if line.startswith("step")] == ["step 3/4", "step 4/4"]  # on lines of their own


def test_plain_lines_in_a_pipe() -> None:
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
    assert done.stdout == "step 3/4\nstep 4/4\n"
    assert done.stderr == ""
