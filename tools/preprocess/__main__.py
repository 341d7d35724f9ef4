"""Text to training data: `megastage-preprocess`, or `python -m tools.preprocess` in a checkout."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 for input that cannot be used, 2 for wrong usage, 130 after Ctrl-C."""
    from .cli import parse

    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
