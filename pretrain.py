"""Entry point: `torchrun pretrain.py --config FILE.toml [--section.key value ...]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megastage import failure, logs, runtime
from megastage.config.load import load_config
from megastage.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run a training job; returns the exit code: 0 done, 2 for input that can't be used, 1 for a run that broke."""
    rank = int(os.environ.get("RANK", "0"))
    logs.setup(rank)
    job = None
    try:
        cfg = load_config(sys.argv[1:] if argv is None else argv, int(os.environ.get("WORLD_SIZE", "1")))
        job = runtime.start(cfg.comm.init_timeout_seconds, cfg.comm.train_timeout_seconds)
        Trainer(cfg, job).run()
    except (Exception, KeyboardInterrupt) as error:
        leads_node = os.environ.get("LOCAL_RANK", "0") == "0"
        return failure.report(error, rank=rank, leads_node=leads_node, store=job.store if job else None)
    job.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
