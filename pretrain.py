"""Entry point: `torchrun pretrain.py --config FILE.toml [--section.key value ...]`."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megastage import failure, logs, planning, runtime
from megastage.config.load import load_config
from megastage.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run a training job; returns the exit code: 0 done, 2 for input that can't be used, 1 for a run that broke."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logs.setup(rank)
    if sys.__stderr__ is not None:  # a file that is cut short under its map ends the process by a signal: say where
        faulthandler.enable(sys.__stderr__)
    job = None
    try:
        cfg = load_config(sys.argv[1:] if argv is None else argv, world_size, look_for_data=True)
        if cfg.memory_estimation.enable:
            sys.stdout.write(planning.memory_report(cfg, world_size) + "\n" if rank == 0 else "")
            return 0
        comm = cfg.comm
        traces = Path(cfg.job.dump_folder) / comm.save_traces_folder
        runtime.record_collectives(comm.trace_buf_size, traces, comm.save_traces_file_prefix)
        runtime.set_deterministic(cfg.debug.deterministic, cfg.debug.deterministic_warn_only)
        job = runtime.start(cfg.comm.init_timeout_seconds, cfg.comm.train_timeout_seconds)
        Trainer(cfg, job).run()
        job.close()
    except (Exception, KeyboardInterrupt) as error:
        leads_node = os.environ.get("LOCAL_RANK", "0") == "0"
        return failure.report(error, rank=rank, leads_node=leads_node, store=job.store if job else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
