"""How many files this process may map."""

from __future__ import annotations

import resource
from contextlib import suppress
from functools import cache

_FILES = 1 << 20


@cache
def allow_many_files() -> None:
    """As many open files as the system lets this process have: each map holds one, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
