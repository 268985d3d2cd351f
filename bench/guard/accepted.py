"""All counts, against what was accepted: ``bench/results/counts/guard.json``."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import snapshot
from bench.guard import vlm
from bench.guard.cases import cases
from bench.guard.count import OURS, count
from bench.harness import package_version, provenance

PATH = snapshot.FOLDER / "guard.json"
ACCEPT = "If that is meant, python -m bench.guard --write accepts it."


def counted() -> dict[str, dict[str, Any]]:
    """Every row, by the name of its case."""
    return {name: count(call).row() for name, call in cases().items()} | vlm.rows()


def versions() -> dict[str, str]:
    """What the numbers that are not our own depend on: major and minor versions."""
    found = {package: package_version(package) or "0" for package in ("torch", "transformers")}
    return {package: ".".join(version.split("+")[0].split(".")[:2]) for package, version in found.items()}


def compare(found: Mapping[str, snapshot.Row], path: Path) -> tuple[list[str], bool]:
    """Lines to print, and whether ``found`` is what was accepted.

    With other versions of torch or transformers than the snapshot's, only what our own code decides is
    compared: launches, and FLOPs by our formulas.
    """
    accepted = snapshot.read(path)
    if not accepted:
        return [f"there is no {path.name}. python -m bench.guard --write makes it"], False
    old: Mapping[str, snapshot.Row] = accepted["cases"]
    lines = []
    made_with = accepted["versions"]
    if made_with != versions():
        lines.append(f"{path.name} is of {made_with}, this is {versions()}: only launches and FLOPs compared")
        old, found = _ours(old), _ours(found)
    changes = snapshot.changes(old, found, whole=True)
    if changes:
        return [*lines, *changes, f"{len(changes)} differences to {path.name}. {ACCEPT}"], False
    return [*lines, f"{len(found)} cases, all as in {path.name}"], True


def _ours(rows: Mapping[str, snapshot.Row]) -> dict[str, snapshot.Row]:
    return {name: {field: row[field] for field in OURS if field in row} for name, row in rows.items()}


def renew(found: Mapping[str, snapshot.Row], path: Path) -> None:
    """Accept ``found``."""
    head = {
        "versions": versions(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": provenance()["commit"],
    }
    snapshot.write(path, {**head, "cases": found}, depth=2)
