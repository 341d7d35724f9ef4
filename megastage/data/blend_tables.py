"""Draw orders on rank 0, made while sources are opened, and on their way to the others: sent faster than made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np

from megastage.data.blend import COMPILE_FROM, BlendTable, integer_weights
from megastage.data.collective import Group, broadcast_bytes


@contextmanager
def tables_made(weightings: Iterable[Sequence[float]]) -> Iterator[dict[bytes, BlendTable]]:
    """Draw orders by the bytes of their integer weights, made by another thread: all are there when this is left.

    Weights that can't be used are passed over; they are reported where a stage asks for its table.
    """
    tables: dict[bytes, BlendTable] = {}

    def make() -> None:
        for weighting in weightings:
            with suppress(ValueError):
                weights = integer_weights(weighting)
                if weights.tobytes() not in tables:
                    tables[weights.tobytes()] = BlendTable.build(weights)

    with ThreadPoolExecutor(1, "data-tables") as other:
        made = other.submit(make)
        yield tables
        made.result()


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
