"""Text to training data: `megastage-preprocess`, or `python -m tools.preprocess` in a checkout."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 for input that cannot be used, 2 for wrong usage, 130 after Ctrl-C."""
    from .cli import parse

    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        with _ended_by_interrupt():
            return options.run(options)
    except BrokenPipeError:
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _ended_by_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C ends the process at once with one line and status 130.

    No KeyboardInterrupt is raised: one that falls into a callback is swallowed, one in native code may come out as
    another error, and one inside `exec` changes the exit status. Ending here loses nothing, since a killed run can be
    continued just as well, and workers end with their parent. Where SIGINT is ignored or somebody else's, it stays so.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: Any) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted; the same command goes on from here\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
