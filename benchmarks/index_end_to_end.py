"""From files to a ready index: 4 sources of 50 M tokens, 10 M samples of 4096, against megatron-core's builder.

    python benchmarks/index_end_to_end.py

Theirs: `BlendedMegatronDatasetBuilder.build()` with an empty cache folder. Ours: `DataEngine.build`, and the first
batch's plan. Bytes: theirs, the index files; ours, the table and what rank 0 broadcasts.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from common import DataStage, alone, in_turn, megatron_config, show, verdict, write_tokens

from megastage.data.engine import DataEngine
from megastage.data.index import _describe
from megastage.data.plan import Planner
from megastage.data.state import record_of

SAMPLES = 10_000_000
WEIGHTS = (0.4, 0.3, 0.2, 0.1)
FASTER, SMALLER = 50.0, 100.0


def main() -> None:
    # megastage is tried as one process without a group; megatron-core asks for one
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as name, alone():
        folder = Path(name)
        prefixes = [write_tokens(folder / f"s{i}", 50_000_000, seed=i) for i in range(4)]
        blend = ([str(prefix) for prefix in prefixes], list(WEIGHTS))
        config = megatron_config(folder / "cache", 4096, blend)
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset

        sizes = {}

        def theirs() -> None:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            built = BlendedMegatronDatasetBuilder(GPTDataset, [SAMPLES, 0, 0], lambda: True, config).build()
            assert len(built[0]) >= SAMPLES
            sizes["theirs"] = sum(file.stat().st_size for file in (folder / "cache").rglob("*") if file.is_file())

        stage = DataStage(
            end_step=SAMPLES // 1024, dataset_folders=tuple(str(p.parent) for p in prefixes), dataset_weights=WEIGHTS
        )

        def ours() -> None:
            engine = DataEngine.build([stage], vocab_size=50_257)
            Planner(engine.index, [], record_of(stage, engine.index)).plan(0, 1024)
            table = engine.index.stages[0].table
            sizes["ours"] = len(json.dumps(_describe(engine.index))) + table.source.nbytes + table.rank.nbytes

        times = in_turn({"ours": ours, "theirs": theirs})
    show("time:", times)
    show("index:", sizes, "bytes")
    small = verdict(sizes["theirs"] / sizes["ours"], SMALLER, "bytes")
    sys.exit(not (verdict(times["theirs"] / times["ours"], FASTER, "time") and small))


if __name__ == "__main__":
    main()
