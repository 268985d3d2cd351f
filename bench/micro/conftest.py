"""Options, the recorder, and what is printed at the end."""

from __future__ import annotations

import functools
import time
from pathlib import Path

import pytest

from bench.micro.case import bench_device
from bench.micro.measure import Benchmark, Measure, late_after, measure
from bench.micro.record import Recorder, Row, with_speedups

_RESULTS = Path(__file__).parents[1] / "results"
_RECORDER = pytest.StashKey[Recorder]()
_START = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where results go, and how long to measure."""
    group = parser.getgroup("microbenchmarks")
    group.addoption("--record", action="store_true", help="keep the rows; default: a temporary folder")
    group.addoption(
        "--results", type=Path, default=_RESULTS, help="with --record: their folder; default: bench/results"
    )
    group.addoption("--commit", help="commit of this tree, where git can't tell")
    group.addoption("--seconds", type=float, help="time a row about this long; default: 0.2, 1 on a CPU")
    group.addoption("--deadline", type=float, help="start no row after this many seconds")


def pytest_configure(config: pytest.Config) -> None:
    """One recorder for the session."""
    folder = config.getoption("results") if config.getoption("record") else None
    config.stash[_RECORDER] = Recorder(folder, bench_device(), config.getoption("commit"))
    config.stash[_START] = time.monotonic()


@pytest.fixture
def micro(request: pytest.FixtureRequest, benchmark: Benchmark) -> Measure:
    """Measures one row."""
    config = request.config
    late_after(config.getoption("deadline"), time.monotonic() - config.stash[_START])
    seconds = config.getoption("seconds")
    if seconds is None:
        seconds = 0.2 if bench_device().type == "cuda" else 1.0
    return functools.partial(
        measure,
        benchmark=benchmark,
        recorder=config.stash[_RECORDER],
        device=bench_device(),
        seconds=seconds,
    )


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Ours against the floor and the baselines, and where everything was written."""
    recorder = config.stash[_RECORDER]
    terminalreporter.section(f"ocvtp microbenchmarks on {recorder.device}")
    if recorder.note:
        terminalreporter.line(recorder.note)
    for family in recorder.families():
        for row in with_speedups(recorder.rows(family)):
            if row["implementation"].startswith("ours") or bench_device().type == "cpu":
                terminalreporter.line(_line(row))
    if recorder.families():
        terminalreporter.line(f"rows written to {recorder.folder}")


def _line(row: Row) -> str:
    what = f"{row['op']} {row['case']} B={row['shape']['B']} {row['dtype']}"
    how = f"{row['implementation']} {row['mode']}"
    line = f"{what} {how}: {row['median_us']:.1f} us ({row['p20_us']:.1f} - {row['p80_us']:.1f})"
    if "percent_of_floor" in row:
        line += f", {row['percent_of_floor']:.0f} % of floor"
    speedups = [f"{ratio:.2f}x {name}" for name, ratio in row.get("speedup_over", {}).items()]
    return line + (", " if speedups else "") + ", ".join(speedups)
