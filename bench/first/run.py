"""Runs one step in a process of its own, within its time, and keeps what it says as it says it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Begins a line of a step that is a finding: JSON follows.
MARK = "finding: "
_KEPT_LINES = 25
_TEST = re.compile(r"\b(PASSED|FAILED|SKIPPED|ERROR)\b")

Finding = dict[str, Any]


def run(
    command: Sequence[str],
    seconds: float,
    environment: Mapping[str, str],
    found: Callable[[Finding], None],
    folder: Path,
) -> dict[str, Any]:
    """Run ``command`` for at most ``seconds``; what became of it.

    Args:
        command: to run.
        seconds: after which it and its children are killed.
        environment: its variables, besides this process's.
        found: is told every finding at once.
        folder: to run in.

    Returns:
        ``outcome`` (``"done"``, ``"failed"`` or ``"out of time"``), ``code`` it ended with, ``seconds``,
        ``tests`` by result, those of them that ``failed``, and the last lines that it ``said``.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
    reader.start()
    said: list[str] = []
    tests: Counter[str] = Counter()
    failed: list[str] = []
    late = False
    while True:
        left = start + seconds - time.monotonic()
        try:
            line = lines.get(timeout=max(left, 0.0)) if left > 0 else None
        except queue.Empty:
            line = None
        if line is None:
            late = reader.is_alive() and time.monotonic() >= start + seconds
            break
        if line.startswith(MARK):
            with contextlib.suppress(ValueError):  # cut off
                found(json.loads(line.removeprefix(MARK)))
        elif line.strip():
            said.append(line.rstrip())
            result = _TEST.search(line)
            if result and not line.startswith(("FAILED", "ERROR")):  # not pytest's summary: it has them again
                tests[result[0].lower()] += 1
                failed += [line.strip()] if result[0] in ("FAILED", "ERROR") else []
    if late:
        _kill(process)
    code = process.wait()
    outcome = "out of time" if late else "done" if code == 0 else "failed"
    return {
        "outcome": outcome,
        "code": code,
        "seconds": round(time.monotonic() - start, 1),
        "tests": dict(tests),
        "failed": failed[:_KEPT_LINES],
        "said": said[-_KEPT_LINES:],
    }


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _kill(process: subprocess.Popen[str]) -> None:
    """It and the processes it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
