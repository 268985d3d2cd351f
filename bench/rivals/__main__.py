"""``python -m bench.rivals --golden FOLDER``: is every rival what its authors' code computes?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.rivals.golden import TOLERANCE
from bench.rivals.run import check_folder


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 1 if anything differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.rivals", description=__doc__)
    parser.add_argument("--golden", type=Path, required=True, help="folder of golden tensors (*.safetensors)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="of values; default: %(default)s, indices must be equal",
    )
    options = parser.parse_args(arguments)
    outcome = check_folder(options.golden, options.tolerance)
    print(*outcome.lines, sep="\n")
    print("proven" if outcome.proven else "NOT proven: see FAILED above")
    return int(not outcome.proven)


if __name__ == "__main__":
    sys.exit(main())
