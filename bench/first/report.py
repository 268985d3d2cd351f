"""The file of the first minutes, written after every finding, and the page that is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.first.plan import Step
from bench.first.run import Finding
from ocvtp.atomic import write_json

# Of what others print, on the page.
_FEW, _WIDTH = 5, 160


class Report:
    """What is known so far.

    Args:
        path: of the file, which is written at every change.
        head: device, commit, versions.
    """

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {**head, "steps": {}}
        path.parent.mkdir(parents=True, exist_ok=True)

    def begin(self, step: Step) -> None:
        """A step starts: should nothing more be heard of it, the file says so."""
        self.data["steps"][step.name] = {"outcome": "not finished", "findings": []}
        self._write()

    def find(self, step: Step, finding: Finding) -> None:
        """A step has found something."""
        self.data["steps"][step.name]["findings"].append(finding)
        self._write()

    def end(self, step: Step, result: Mapping[str, Any]) -> None:
        """A step is over."""
        self.data["steps"][step.name] |= result
        self._write()

    def skip(self, step: Step, left: float) -> None:
        """A step had too little time left."""
        self.data["steps"][step.name] = {
            "outcome": "not started",
            "findings": [],
            "said": [f"it needs {step.least:g} s, {left:.0f} s were left"],
        }
        self._write()

    def _write(self) -> None:
        write_json(self.path, self.data)


def page(data: Mapping[str, Any], steps: Iterable[Step]) -> str:
    """One page: of each step the question, what came out, what it decides."""
    head = [str(data[name]) for name in ("device", "commit", "torch", "triton", "date") if data.get(name)]
    lines = ["", "=" * 100, f"first minutes on a GPU: {', '.join(head)}", "=" * 100]
    for step in steps:
        one = data["steps"].get(step.name, {"outcome": "not started", "findings": [], "said": []})
        took = f" ({one['seconds']:.0f} s)" if "seconds" in one else ""
        lines.append(f"{step.name}: {step.question} [{one['outcome']}{took}]")
        lines += [f"    {said(finding)}" for finding in one["findings"]]
        if one.get("tests"):
            lines.append(f"    {', '.join(f'{count} {result}' for result, count in one['tests'].items())}")
            lines += [f"    {line[:_WIDTH]}" for line in one["failed"][:_FEW]]
        elif one["outcome"] != "done":
            lines += [f"    {line[:_WIDTH]}" for line in one.get("said", [])[-_FEW:]]
        lines.append(f"    decides: {step.decides}")
    return "\n".join(lines)


def said(finding: Finding) -> str:
    """A finding in one line: what, then its figures."""
    figures = [f"{name} {_figure(value)}" for name, value in finding.items() if name != "what"]
    return f"{finding.get('what', '')}: {', '.join(figures)}"


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " / ".join(map(_figure, value))
    return str(value)
