"""Text to training data: `megastage-preprocess`, or `python -m tools.preprocess` in a checkout."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 for input that cannot be used, 2 for wrong usage, 130 after Ctrl-C."""
    from .cli import parse

    _print_anything()
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        with _ended_by_interrupt():
            return options.run(options)
    except BrokenPipeError:
        return 1
    except OSError as error:
        print(f"error: {_explained(error, options)}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _print_anything() -> None:
    """Characters that the terminal's encoding lacks are shown as escapes; file names and samples may hold any."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _explained(error: OSError, options: Namespace) -> str:
    """The file, what went wrong and the way out. An error of writing itself names no file: it is the output then."""
    where = error.filename or getattr(options, "output", None)
    way = {
        errno.ENOSPC: "make room and run the same command again; pieces that are done are kept",
        errno.EDQUOT: "make room and run the same command again; pieces that are done are kept",
        errno.EFBIG: "files of that size are not allowed here; raise the limit or choose another disk",
        errno.EROFS: "choose an output that can be written",
        errno.EACCES: "choose another output, or ask for the right to use this one",
        errno.EPERM: "choose another output, or ask for the right to use this one",
    }.get(error.errno or 0)
    what = f"{where}: {error.strerror}" if where is not None and error.strerror else str(error)
    return f"{what}; {way}" if way else what


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
