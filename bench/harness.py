"""Timing and provenance shared by the benchmarks."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
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


def provenance(device: torch.device | None = None, commit: str | None = None) -> dict[str, object]:
    """What a figure can't be read without: device, threads, versions, commit. No host name, no path.

    Args:
        device: that was measured; default: the CPU.
        commit: of this tree, where git can't tell.
    """
    gpu = device is not None and device.type == "cuda"
    record: dict[str, object | None] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        **(_gpu(device) if gpu else {}),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
    }
    return {name: value for name, value in record.items() if value is not None}


def package_version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_slug(device: torch.device) -> str:
    """A folder's name for results: ``h100``, ``h100-pcie``, ``cpu-epyc-2-cores``."""
    if device.type == "cuda":
        return gpu_slug(torch.cuda.get_device_name(device))
    return cpu_slug(_cpu_name(), os.cpu_count() or 1)


def gpu_slug(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``h100``; other forms of a chip keep what tells them apart."""
    words = re.sub(r"(?<![\w.])(nvidia|amd|tesla|\d+gb|hbm\d\w*)\b", " ", name.lower())
    return _slug(words)


def cpu_slug(name: str, cores: int) -> str:
    """``AMD EPYC 7763 64-Core Processor`` with 2 cores of it at hand -> ``cpu-epyc-7763-2-cores``."""
    words = re.sub(r"\((r|tm)\)|@.*|\b\d+-core\b", " ", name.lower())
    words = re.sub(r"\b(amd|intel|cpu|processor)\b", " ", words)
    return f"cpu-{_slug(words)}-{cores}-cores"


def _slug(words: str) -> str:
    return "-".join(re.findall(r"[a-z0-9.]+", words)) or "unknown"


def _gpu(device: torch.device | None) -> dict[str, object | None]:
    return {
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cpu": _cpu_name(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(printed.split()), None)


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
