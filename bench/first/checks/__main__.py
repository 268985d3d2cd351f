"""One check, in a process of its own: ``python -m bench.first.checks NAME``; prints each finding at once."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

import torch

from bench.first.checks.setting import Setting, tiny
from bench.first.run import MARK

#: Each is the module of its name, and the function in it.
CHECKS = ("stream", "bits", "graphs", "traffic", "launches", "waiting", "vision")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.first.checks", description=__doc__)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="rehearse")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    setting = tiny(device) if options.tiny else Setting(device)
    check = getattr(importlib.import_module(f"bench.first.checks.{options.check}"), options.check)
    for finding in check(setting):
        print(MARK + json.dumps(finding), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
