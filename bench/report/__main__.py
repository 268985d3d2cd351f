"""Documents and pictures from the files of results: ``python -m bench.report [--check]``."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from bench.report.documents import ROOT, faults, renew
from bench.report.results import RESULTS, BadResultError, Results, load


def main(argv: Sequence[str] | None = None) -> int:
    """Renew, or check and exit with 1 if something differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if that would")
    parser.add_argument("--results", type=Path, action="append", help="folders; default: bench/results")
    parser.add_argument("--into", type=Path, help="write copies of the documents there instead")
    arguments = parser.parse_args(argv)
    try:
        # A later folder's file replaces an earlier one's: what a GPU has just made, over what is committed.
        loaded = [load(folder) for folder in [RESULTS, *(arguments.results or [])]]
    except BadResultError as error:
        raise SystemExit(str(error)) from error
    latest = {(one.folder, one.name): one for results in loaded for one in results.all}
    results = Results([latest[key] for key in sorted(latest)])
    root = ROOT
    if arguments.into is not None:
        root = arguments.into
        (root / "docs").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "README.md", root)
        for document in (ROOT / "docs").glob("*.*"):
            shutil.copy(document, root / "docs")
    if arguments.check:
        found = faults(results, root)
        print(*found, sep="\n")
        if found:
            print("renew with: make report. Figures typed by hand belong into a block of bench/report")
        return int(bool(found))
    renew(results, root)
    print(f"documents and pictures from {len(results.all)} results")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
