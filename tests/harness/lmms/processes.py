"""lmms-eval's command in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COMMAND = "import sys\nfrom lmms_eval.__main__ import cli_evaluate\nsys.exit(cli_evaluate())"


def lmms_eval(
    words: Sequence[str], folder: Path, *, before: str = "", processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """``lmms-eval`` with some words.

    Args:
        words: of the command.
        folder: for a script.
        before: code that runs first in each process.
        processes: that share the questions.
    """
    script = folder / "command.py"
    script.write_text(f"{before}\n{_COMMAND}\n", encoding="utf-8")
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if processes > 1:
        own["ACCELERATE_USE_CPU"] = "1"
    return subprocess.run(
        [sys.executable, *(several if processes > 1 else ()), str(script), *words],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def words(
    testbed: Path, output: Path, model: Mapping[str, object], *, limit: int, batch_size: int = 4
) -> list[str]:
    """Of the command that asks the first questions about the test bed."""
    said = ",".join(f"{name}={value}" for name, value in model.items())
    return [
        *("--model", "ocvtp", "--model_args", said, "--include_path", str(testbed)),
        *("--tasks", "ocvtp_testbed", "--limit", str(limit), "--batch_size", str(batch_size)),
        *("--device", "cpu", "--log_samples", "--output_path", str(output)),
    ]


def results(output: Path) -> dict[str, Any]:
    """What the command wrote."""
    (path,) = output.rglob("*_results.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def samples(output: Path) -> list[dict[str, Any]]:
    """Its samples, in the order of the rows."""
    (path,) = output.rglob("*_samples_ocvtp_testbed.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])
