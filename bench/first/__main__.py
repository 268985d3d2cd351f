"""The first minutes on a GPU: ``make gpu-first``, or ``python -m bench.first``.

Runs all steps, keeps findings in RESULTS/<device>/first.json as they come, prints one page. Exits with 1 if a
step failed; one that ran out of time, or for which none was left, says so and is no failure.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.first.budget import Budget
from bench.first.plan import STEPS, Step
from bench.first.report import Report, page
from bench.first.run import run
from bench.harness import device_slug, provenance

ROOT = Path(__file__).parents[2]


def main(argv: Sequence[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.first", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything")
    parser.add_argument("--only", action="append", choices=[step.name for step in steps], help="default: all")
    parser.add_argument("--tiny", action="store_true", help="rehearse: small sizes")
    parser.add_argument("--record", action="store_true", help="write into RESULTS/<device>")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--commit", help="of this tree, where git can't tell")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    results = options.results if options.record else Path(tempfile.mkdtemp(prefix="ocvtp-first-"))
    report = Report(results / device_slug(device) / "first.json", provenance(device, options.commit))
    budget = Budget(60 * options.minutes)
    chosen = [step for step in steps if not options.only or step.name in options.only]
    for step in chosen:
        _take(step, budget, report, options.device, options.tiny)
    print(page(report.data, chosen))
    print(f"findings in {report.path}")
    return int(any(one["outcome"] == "failed" for one in report.data["steps"].values()))


def _take(step: Step, budget: Budget, report: Report, device: str, tiny: bool) -> None:
    seconds = budget.allow(step.limit, step.least)
    if seconds is None:
        report.skip(step, budget.left)
        return
    print(f"{step.name}: {step.question} (up to {seconds:.0f} s)", flush=True)
    report.begin(step)
    try:
        result = run(
            step.command(device, tiny),
            seconds,
            step.environment,
            lambda finding: report.find(step, finding),
            ROOT,
        )
    except OSError as error:
        result = {"outcome": "failed", "said": [str(error)]}
    report.end(step, result)


if __name__ == "__main__":
    sys.exit(main())
