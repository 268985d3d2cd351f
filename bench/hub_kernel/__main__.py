"""``python -m bench.hub_kernel``: see the package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import bench.hub_kernel
from bench.hub_kernel.build import ROOT, build


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.hub_kernel", description=bench.hub_kernel.__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "hub-kernel", help="default: %(default)s"
    )
    parser.add_argument("--repo", help="owner/name on the hub, for the card")
    options = parser.parse_args(arguments)
    for backend, identifier in build(options.out, repo=options.repo).items():
        print(f"{options.out / 'build' / f'torch-{backend}'}: {identifier}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
