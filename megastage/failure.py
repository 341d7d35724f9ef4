"""How a run ends when it can't go on: each message once over the whole job, whichever ranks met it, and an exit code.

The ranks of a job share a store that outlives their connections (torchrun's agent keeps it). Whoever fails first
notes it there before its connections close, so that its peers can tell a failure of their own from the echo of
another's.
"""

from __future__ import annotations

import dis
import hashlib
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

BAD_INPUT, BROKEN, INTERRUPTED = 2, 1, 130
_PRECEDENCE_S = 0.3
_LEADER_PATIENCE_S = 5.0
_PATIENCE = timedelta(seconds=10)
_PACKAGE = Path(__file__).resolve().parent


def report(error: BaseException, *, rank: int, leads_node: bool, store: dist.Store | None) -> int:
    """Print what ended this rank, unless another rank has said the same or caused it; returns the exit code.

    store: of the job; None before there is one, when every rank meets the same and the first of each node speaks.
    What this program raised on purpose is printed as it stands, anything else with its traceback.
    """
    code, text = _explain(error)
    if store is None:
        first = leads_node
        if not first:  # whose end would make torchrun stop the one that speaks, perhaps in front of its first word
            time.sleep(_LEADER_PATIENCE_S)
    elif is_lost_peer(error):
        # without a store to ask, its host is what was lost, and has most likely said why
        first = not _noted(store, otherwise=not leads_node) and _first(store, "lost a peer", otherwise=leads_node)
    else:
        _note(store)
        if rank != 0:  # what all ranks met is for rank 0 to say
            time.sleep(_PRECEDENCE_S)
        first = _first(store, text, otherwise=True)
    if first:
        several = store is not None and rank != 0
        sys.stderr.write(f"[rank {rank}] {text}\n" if several else f"{text}\n")
        sys.stderr.flush()
        with suppress(Exception):
            _tell_torchrun(error, bare=not text.startswith("Traceback"))
    return code


def _tell_torchrun(error: BaseException, *, bare: bool) -> None:
    """Leave the error for torchrun's own summary; `bare`: as the program says it, without where it was raised."""
    origin = error.__traceback__, error.__cause__, error.__suppress_context__
    if bare:
        error.__traceback__, error.__cause__, error.__suppress_context__ = None, None, True
    try:
        get_error_handler().record_exception(error)
    finally:
        error.__traceback__, error.__cause__, error.__suppress_context__ = origin


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError) or (isinstance(seen, RuntimeError) and "gloo" in str(seen)):
            return True
        seen = seen.__cause__
    return False


def _explain(error: BaseException) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "Interrupted; the newest checkpoint, if there is one, is where the next start goes on"
    if is_lost_peer(error):
        return BROKEN, (
            "Lost contact with another rank, which was killed, ran out of memory, is stuck or whose machine is down; "
            f"its own output or the launcher's summary says more ({str(error).splitlines()[0]})"
        )
    if isinstance(error, ValueError) and _was_raised_here(error.__traceback__):
        return BAD_INPUT, str(error)
    if isinstance(error, RuntimeError | ArithmeticError | OSError) and _was_raised_here(error.__traceback__):
        return BROKEN, str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return BROKEN, f"{error.strerror}: {error.filename}"
    return BROKEN, "".join(traceback.format_exception(error)).rstrip()


def _was_raised_here(trace: TracebackType | None) -> bool:
    """Whether a `raise` of this package, not a call that went wrong, is where the exception comes from."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return raised and _PACKAGE in Path(code.co_filename).resolve().parents


def _first(store: dist.Store, text: str, *, otherwise: bool) -> bool:
    """Whether no rank has said `text` before; `otherwise` where the store is gone."""
    try:
        store.set_timeout(_PATIENCE)
        return int(store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1)) == 1
    except Exception:
        return otherwise


def _note(store: dist.Store) -> None:
    with suppress(Exception):
        store.set("failed", "1")


def _noted(store: dist.Store, *, otherwise: bool) -> bool:
    try:
        store.set_timeout(_PATIENCE)
        return bool(store.check(["failed"]))
    except Exception:
        return otherwise
