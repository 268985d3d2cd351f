"""Folders that lmms-eval wrote, read back: one folder is one row of a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ocvtp.harness.protocol import BENCHMARKS

#: Of a record's settings, those that have no say in the answers, but for rounding: runs of one row may differ
#: in them, and a resumed run from the one before it.
FREE = ("resume", "batch_size", "device", "device_map")


class NoResultsError(ValueError):
    """A folder without results, or with results that can't be read; the message names it."""


@dataclass(frozen=True)
class Row:
    """What one setting's runs found.

    Attributes:
        label: for the table.
        scores: by benchmark and name of the score: lmms-eval's numbers, added up.
        counts: by task, how many questions were answered.
        parts: by task that was not asked in full, how many questions were answered, and of how many.
        tasks: by task, its settings as lmms-eval wrote them: data, prompt, metrics.
        runs: the whole of every file that a result is from, oldest first.
    """

    label: str
    scores: Mapping[tuple[str, str], float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    runs: tuple[Mapping[str, Any], ...] = ()

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """What our model said of itself in :attr:`runs`; another model says nothing."""
        return [found for found in map(record_in, self.runs) if found is not None]

    @property
    def record(self) -> Mapping[str, Any] | None:
        """Of the newest run that has one."""
        return self.records[-1] if self.records else None

    def measured(self, name: str) -> float | None:
        """A figure per image, over all runs; ``None``: none of them has it."""
        figures = [part(record, "measured") for record in self.records]
        pairs = [(each[name], each["images"]) for each in figures if name in each and each.get("images")]
        images = sum(number for _, number in pairs)
        return sum(value * number for value, number in pairs) / images if images else None


def read_row(folder: Path, label: str | None = None) -> Row:
    """The newest result of every task in a folder, from however many runs.

    Args:
        folder: that ``--output_path`` named.
        label: for the table; ``None``: the folder's name.

    Raises:
        NoResultsError: there is none, or one that is damaged.
    """
    if not folder.is_dir():
        raise NoResultsError(f"no folder {folder}")
    files = sorted(folder.rglob("*_results.json"), key=lambda path: (path.name, str(path)))
    if not files:
        raise NoResultsError(
            f"{folder} has no *_results.json: its run failed, or goes on (lmms-eval exits with 0 after an "
            "exception)"
        )
    numbers: dict[str, dict[str, float]] = {}
    owner: dict[str, int] = {}
    wholes = [_read(path) for path in files]
    for index, whole in enumerate(wholes):
        for task, values in whole["results"].items():
            if found := _numbers(values):  # a group has none of its own
                numbers[task], owner[task] = found, index
    scores = {}
    for one in BENCHMARKS:
        for score in one.scores:
            values = [numbers.get(one.task, {}).get(metric) for metric in score.metrics]
            if None not in values:
                scores[one.name, score.name] = sum(value for value in values if value is not None)
    if not scores:
        raise NoResultsError(
            f"{folder} has results of {', '.join(sorted(numbers)) or 'no task'}, and of none of the paper's "
            f"benchmarks ({', '.join(one.task for one in BENCHMARKS)})"
        )
    ours = {task: index for task, index in owner.items() if task in {one.task for one in BENCHMARKS}}
    said = {task: questions(wholes[index]).get(task) for task, index in ours.items()}
    asked = {task: pair for task, pair in said.items() if pair is not None}
    return Row(
        label or folder.name,
        scores,
        {task: number for task, (number, _) in asked.items()},
        {task: (number, of) for task, (number, of) in asked.items() if of is not None and number < of},
        {task: part(part(wholes[index], "configs"), task) for task, index in ours.items()},
        tuple(wholes[index] for index in sorted(set(ours.values()))),
    )


def record_in(whole: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Ours, which lmms-eval puts among the sizes of batches."""
    sizes = part(whole, "config").get("batch_sizes")
    for one in sizes if isinstance(sizes, list) else ():
        if isinstance(one, Mapping) and "ocvtp" in one:
            return one
    return None


def part(whole: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object under a name; an empty one where there is something else or nothing."""
    found = whole.get(name)
    return found if isinstance(found, Mapping) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        # lmms-eval writes NaN where it has no standard error; that is no JSON, and no score either.
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
    except (OSError, ValueError) as error:
        raise NoResultsError(f"{path} can't be read: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("results"), dict):
        raise NoResultsError(f"{path} is no results file of lmms-eval: it has no results")
    return found


def _numbers(values: Any) -> dict[str, float]:
    """Metrics by name, whatever filter they came through (one, in the paper's tasks)."""
    if not isinstance(values, Mapping):
        return {}
    return {
        name.split(",")[0]: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def command(whole: Mapping[str, Any]) -> dict[str, Any]:
    """What lmms-eval was called with, as it was or as it was understood."""
    config = part(whole, "config")
    return {**part(config, "resolved_cli_args"), **config}


def questions(whole: Mapping[str, Any]) -> dict[str, tuple[int, int | None]]:
    """By task, how many questions a run scored, and of how many (``None``: it doesn't say)."""
    offset = command(whole).get("offset")
    found: dict[str, tuple[int, int | None]] = {}
    for task, said in part(whole, "n-samples").items():
        numbers = said if isinstance(said, Mapping) else {"effective": said}
        effective, of = _whole_number(numbers.get("effective")), _whole_number(numbers.get("original"))
        if effective is not None:
            if of is not None and isinstance(offset, int):  # which lmms-eval's count takes no notice of
                effective = max(0, min(effective, of - offset))
            found[task] = effective, of
    return found


def _whole_number(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) else None
