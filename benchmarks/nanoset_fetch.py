"""Shuffled samples of a nanoset with document positions, one process: the data engine against datatrove's reader.

    python benchmarks/nanoset_fetch.py       (pip install datatrove)

Ours: batches of 64 rows of 4096 in the order of training, with tokens, labels, bounds and positions made, planning
included. datatrove: `DatatroveFolderDataset(return_positions=True)`, items in random order.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from common import DataStage, alone, in_turn, show, verdict, write_tokens

from megastage.data.engine import DataEngine

T, ROWS, BAR = 4096, 64, 500.0
BATCHES, THEIR_ITEMS = 32, 8


def main() -> None:
    warnings.simplefilter("ignore")
    from datatrove.utils.dataset import DatatroveFolderDataset

    with tempfile.TemporaryDirectory() as name, alone():
        folder = write_tokens(Path(name) / "data", 100_000_000).parent
        theirs = DatatroveFolderDataset(str(folder), T, filename_pattern="*.ds", token_size=2, return_positions=True)
        order = iter(np.random.default_rng(0).permutation(len(theirs)).tolist())
        engine = DataEngine.build(
            [DataStage(dataset_folders=(str(folder),), global_batch_size=ROWS)], vocab_size=50_257
        )
        engine.enter(0, data_rank=0, data_ranks=1)

        def ours() -> None:
            for _ in range(BATCHES):
                assert engine.next().positions_BT.shape == (ROWS, T)

        def datatrove() -> None:
            for _ in range(THEIR_ITEMS):
                assert len(theirs[next(order)]["positions"]) == T + 1

        times = in_turn({"ours": ours, "datatrove": datatrove})
        engine.close()
    rates = {"ours": BATCHES * ROWS / times["ours"], "datatrove": THEIR_ITEMS / times["datatrove"]}
    show("samples a second:", rates, "/s")
    sys.exit(not verdict(rates["ours"] / rates["datatrove"], BAR))


if __name__ == "__main__":
    main()
