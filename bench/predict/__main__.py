"""Predicts what our kernels take on an H100: ``python -m bench.predict [--write]``.

Prints a table for each call and whether the targets would be met. ``--write`` keeps it in
bench/results/counts/predict.json, as what comes after a change (``--as before``: what was before), and renews
the documents. With it goes what tiles by number of rows would take, which launchers use once a GPU has shown
their bits (``python -m bench.same_bits``). A missed target is no failure: nothing here was measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench.predict import record
from bench.predict.targets import BY_ROWS, NAMES, verdicts
from ocvtp_kernels._arch import interpreting
from ocvtp_kernels._tiles import trusting_bits


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__)
    parser.add_argument("--write", action="store_true", help="keep the prediction, and renew the documents")
    parser.add_argument("--as", dest="name", choices=NAMES[:2], default="after")
    parser.add_argument("--commit", help="of the kernels, where git can't tell")
    options = parser.parse_args(argv)
    if interpreting():
        parser.error("unset TRITON_INTERPRET: interpreted kernels can't be compiled")
    from bench.report.predicted import kernel_tables

    made = {options.name: record.predicted(options.commit)}
    if options.name == "after":
        with trusting_bits():
            made[BY_ROWS] = record.predicted(options.commit)
    for name, part in made.items():
        print(f"{name}:", kernel_tables(part), sep="\n")
        print(*(f"{line.name}: {line.said}" for line in verdicts(part)), sep="\n")
    if options.write:
        from bench.report.__main__ import main as report

        for name, part in made.items():
            record.write(name, part)
        return report([])
    return 0


if __name__ == "__main__":
    sys.exit(main())
