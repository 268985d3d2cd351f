"""``python -m bench.guard``: count, and compare with what was accepted."""

from __future__ import annotations

import argparse
import sys

from bench.guard import accepted


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.guard", description=__doc__)
    parser.add_argument("--write", action="store_true", help="accept what was counted: renew the snapshot")
    options = parser.parse_args(arguments)
    found = accepted.counted()
    if options.write:
        accepted.renew(found, accepted.PATH)
        print(f"{len(found)} cases written to {accepted.PATH.name}")
        return 0
    lines, same = accepted.compare(found, accepted.PATH)
    print(*lines, sep="\n")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
