"""Draw orders on their way from rank 0: a long period is sent faster than every rank makes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megastage.data.blend import COMPILE_FROM, BlendTable
from megastage.data.collective import Group, broadcast_bytes


def long_tables(tables: Sequence[BlendTable]) -> list[BlendTable]:
    """Those worth sending, each once, in order."""
    return list({table.weights.tobytes(): table for table in tables if table.period >= COMPILE_FROM}.values())


def broadcast_tables(
    mine: Sequence[BlendTable] | None, blends: Sequence[Sequence[int]], group: Group
) -> dict[bytes, BlendTable]:
    """Rank 0's long tables by the bytes of their weights, on the other ranks (rank 0 gets none).

    mine: rank 0's tables, None elsewhere; blends: the integer weights of the long ones, known to all.
    """
    draws = b"".join(table.source.astype("<i2").tobytes() for table in long_tables(mine or []))
    received = np.frombuffer(broadcast_bytes(draws, group), "<i2").astype(np.int16)
    if mine is not None:
        return {}
    tables, start = {}, 0
    for integers in blends:
        weights = np.array(integers, np.int64)
        stop = start + int(weights.sum())
        tables[weights.tobytes()] = BlendTable.from_source(weights, received[start:stop])
        start = stop
    return tables
