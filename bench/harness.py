"""Timing and provenance shared by the benchmarks."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call."""

    median: float
    p20: float
    p80: float
    calls: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ms ({self.p20:.2f} - {self.p80:.2f})"

    def to_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return asdict(self)


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, seconds: float = 5.0, least: int = 5, most: int = 200
) -> dict[str, Timing]:
    """Time several CPU functions in turns, so that a slow spell of the machine hits all of them alike.

    Args:
        calls: name -> function without arguments. Each is called once, untimed, first.
        seconds: stop after about this long in total, but
        least: call each at least this often and
        most: at most this often.
    """
    for call in calls.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for round_ in range(most):
        if round_ >= least and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: summarise(values) for name, values in samples.items()}


def summarise(milliseconds: list[float]) -> Timing:
    """Median and 20th / 80th percentile."""
    quantiles = torch.tensor(milliseconds, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    )
    median, p20, p80 = quantiles.tolist()
    return Timing(median, p20, p80, len(milliseconds))


def provenance() -> dict[str, object]:
    """What a figure can't be read without: device, threads, versions, commit."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _commit() -> str:
    """The commit measured, with ``-dirty`` if the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        root = Path(__file__).parent
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
