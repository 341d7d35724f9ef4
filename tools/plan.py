"""`python -m tools.plan --nproc N --config FILE.toml [--section.key value ...]`: what a run would do, on any machine.

Prints the layout, the stage plan with epochs of every source, tokens, FLOPs and the memory of each pipeline rank.
With --no-data the sources are not opened, for a machine that doesn't have them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megastage import logs, planning
from megastage.config.load import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; returns 0, or 2 for a run that could not start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=1, help="ranks of the run (default 1)")
    parser.add_argument("--no-data", action="store_true", help="do not open the data")
    own, rest = parser.parse_known_args(argv)
    logs.setup(0, sys.stderr)
    try:
        print(planning.report(load_config(rest, own.nproc), own.nproc, read_data=not own.no_data))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
