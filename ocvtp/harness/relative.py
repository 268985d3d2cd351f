"""The table of finished runs: ``python -m ocvtp.harness.relative runs/none runs/pruner-192 ...``.

The first row is the unpruned model. Of every benchmark: the score and its share of the unpruned one; then
average relative accuracy, the mean of the shares, as pruning papers print it (convention; the official
repository has no code for it). A result that is missing is called so, and is in no mean.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ocvtp.harness.protocol import BENCHMARKS, TEN, Benchmark, Score

_HOW = "mean of 100 x score / unpruned score"


class NoResultsError(ValueError):
    """A folder without results, or with results that can't be read; the message names it."""


@dataclass(frozen=True)
class Row:
    """What one setting's runs found.

    Attributes:
        label: for the table.
        scores: by benchmark and name of the score: lmms-eval's numbers, added up.
        counts: by task, how many questions were answered.
        record: of the newest run; ``None``: it was not by our model.
    """

    label: str
    scores: Mapping[tuple[str, str], float]
    counts: Mapping[str, int]
    record: Mapping[str, Any] | None

    def measured(self, name: str) -> float | None:
        """A figure of the record."""
        found = ((self.record or {}).get("measured") or {}).get(name)
        return float(found) if isinstance(found, (int, float)) else None


def read_row(folder: Path) -> Row:
    """The newest result of every task in a folder, from however many runs.

    Raises:
        NoResultsError: there is none, or one that is damaged.
    """
    if not folder.is_dir():
        raise NoResultsError(f"no folder {folder}")
    files = sorted(folder.rglob("*_results.json"), key=lambda path: path.name)
    if not files:
        raise NoResultsError(
            f"{folder} has no *_results.json: its run failed, or goes on (lmms-eval exits with 0 after an "
            "exception)"
        )
    tasks: dict[str, dict[str, float]] = {}
    counts: dict[str, int] = {}
    record: Mapping[str, Any] | None = None
    for path in files:
        found = _read(path)
        record = _record(found) or record
        for task, values in _section(found, "results", path).items():
            tasks[task] = _numbers(values)
        for task, samples in (found.get("n-samples") or {}).items():
            number = samples.get("effective") if isinstance(samples, Mapping) else samples
            if isinstance(number, (int, float)):
                counts[task] = int(number)
    scores = {}
    for one in BENCHMARKS:
        for score in one.scores:
            values = [tasks.get(one.task, {}).get(metric) for metric in score.metrics]
            if None not in values:
                scores[one.name, score.name] = sum(value for value in values if value is not None)
    if not scores:
        raise NoResultsError(
            f"{folder} has results of {', '.join(sorted(tasks)) or 'no task'}, and of none of the paper's "
            f"benchmarks ({', '.join(one.task for one in BENCHMARKS)})"
        )
    return Row(folder.name, scores, counts, record)


def shares(row: Row, base: Row) -> dict[tuple[str, str], float]:
    """100 * score / unpruned score, where both have one and the unpruned one is not 0."""
    return {key: 100 * value / base.scores[key] for key, value in row.scores.items() if base.scores.get(key)}


@dataclass(frozen=True)
class Average:
    """Average relative accuracy of a row.

    Attributes:
        value: by the first score of each benchmark, in percent; ``None``: no benchmark is there.
        low: the lowest of all choices of scores.
        high: the highest.
        of: benchmarks that are in it.
        missing: those that are not, of those asked for.
    """

    value: float | None
    low: float | None
    high: float | None
    of: tuple[str, ...]
    missing: tuple[str, ...]


def average(row: Row, base: Row, benchmarks: Sequence[Benchmark]) -> Average:
    """Over the benchmarks of which row and base have a share, one score each."""
    found = shares(row, base)
    choices = []
    there: list[str] = []
    missing: list[str] = []
    for one in benchmarks:
        values = [found[one.name, score.name] for score in one.scores if (one.name, score.name) in found]
        (there if values else missing).append(one.name)
        if values:
            choices.append(values)
    if not choices:
        return Average(None, None, None, (), tuple(missing))
    means = [statistics.fmean(combination) for combination in itertools.product(*choices)]
    return Average(means[0], min(means), max(means), tuple(there), tuple(missing))


def table(rows: Sequence[Row], benchmarks: Sequence[Benchmark] = BENCHMARKS) -> str:
    """Markdown; the first row is the unpruned one. Benchmarks that no row has are left out, and named."""
    base = rows[0]
    columns = [
        (one, score)
        for one in benchmarks
        for score in one.scores
        if any((one.name, score.name) in row.scores for row in rows)
    ]
    seen = [one for one in benchmarks if any(one is column[0] for column in columns)]
    head = ["", "tokens", "s/image", *(_title(*column) for column in columns), "average"]
    lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    notes = []
    for row in rows:
        found, mean = shares(row, base), average(row, base, seen)
        cells = [_cell(row, found, (one.name, score.name)) for one, score in columns]
        tokens, seconds = row.measured("kept_vision_tokens_per_image"), row.measured("seconds_per_image")
        lines.append(
            _line(
                [
                    row.label,
                    "" if tokens is None else f"{tokens:.1f}",
                    "" if seconds is None else f"{seconds:.4g}",
                    *cells,
                    _mean(mean, len(seen)),
                ]
            )
        )
        if mean.missing:
            notes.append(f"{row.label}: not in the average: {', '.join(mean.missing)}")
    never = [one.name for one in benchmarks if one not in seen]
    if never:
        notes.append(f"no run has results of {', '.join(never)}")
    notes += _ambiguous(seen) + differences(rows)
    about = (
        f"In brackets: percent of the unpruned score. average: {_HOW}, by the first score of each benchmark, "
        "and in brackets the range over all choices of scores. tokens: mean vision tokens of an image that "
        "enter the language model. s/image: around `generate`."
    )
    return "\n".join([*lines, "", about, *(f"- {note}" for note in notes)])


def differences(rows: Sequence[Row]) -> list[str]:
    """What is not the same in rows, so that shares compare other things than pruning."""
    notes = []
    base = rows[0]
    settings = (base.record or {}).get("settings")
    if base.record is not None and (settings or {}).get("pruner") != "none":
        notes.append(f"the first row, {base.label}, is pruned itself: shares are of that")
    for row in rows[1:]:
        if row.record is None or base.record is None:
            continue
        other = [
            f"{part}.{name}"
            for part, names in (("settings", _SAME), ("versions", sorted(base.record.get("versions", {}))))
            for name in names
            if row.record.get(part, {}).get(name) != base.record.get(part, {}).get(name)
        ]
        if row.record.get("model", {}).get("sample_sha256") != base.record.get("model", {}).get(
            "sample_sha256"
        ):
            other.insert(0, "the model's weights")
        if other:
            notes.append(f"{row.label} differs from {base.label} in {', '.join(other)}")
    for row in rows[1:]:
        other = [
            f"{task} ({row.counts[task]} and {base.counts[task]})"
            for task in sorted(set(row.counts) & set(base.counts))
            if row.counts[task] != base.counts[task]
        ]
        if other:
            notes.append(
                f"{row.label} answered other numbers of questions than {base.label}: {', '.join(other)}"
            )
    return notes


#: Settings that are to be the same in all rows.
_SAME = (
    "dtype",
    "system_prompt",
    "chat_template",
    "pad_to_square",
    "image_grid_pinpoints",
    "min_pixels",
    "max_pixels",
    "max_new_tokens",
)


def to_json(rows: Sequence[Row], benchmarks: Sequence[Benchmark] = BENCHMARKS) -> list[dict[str, Any]]:
    """The same for programs: scores, shares, averages and records by row."""
    base = rows[0]
    found = []
    for row in rows:
        mean, share = average(row, base, benchmarks), shares(row, base)
        found.append(
            {
                "label": row.label,
                "scores": {_key(*key): value for key, value in row.scores.items()},
                "shares": {_key(*key): value for key, value in share.items()},
                "average": vars(mean) | {"of": list(mean.of), "missing": list(mean.missing)},
                "questions": dict(row.counts),
                "record": row.record,
            }
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        # lmms-eval writes NaN where it has no standard error; that is no JSON, and no score either.
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: None)
    except (OSError, ValueError) as error:
        raise NoResultsError(f"{path} can't be read: {error}") from error
    if not isinstance(found, dict):
        raise NoResultsError(f"{path} is no results file of lmms-eval: it is no JSON object")
    return found


def _section(found: Mapping[str, Any], name: str, path: Path) -> Mapping[str, Any]:
    section = found.get(name)
    if not isinstance(section, Mapping):
        raise NoResultsError(f"{path} is no results file of lmms-eval: it has no {name}")
    return section


def _record(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Ours, which lmms-eval puts among the sizes of batches."""
    for one in (found.get("config") or {}).get("batch_sizes") or ():
        if isinstance(one, Mapping) and "ocvtp" in one:
            return one
    return None


def _numbers(values: Any) -> dict[str, float]:
    """Metrics by name, whatever filter they came through (one, in the paper's tasks)."""
    if not isinstance(values, Mapping):
        return {}
    return {
        name.split(",")[0]: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _title(one: Benchmark, score: Score) -> str:
    return f"{one.name} {score.name}".strip()


def _key(benchmark: str, score: str) -> str:
    return f"{benchmark} {score}".strip()


def _cell(row: Row, found: Mapping[tuple[str, str], float], key: tuple[str, str]) -> str:
    if key not in row.scores:
        return "missing"
    share = f"{found[key]:.1f}" if key in found else "no share"
    return f"{row.scores[key]:.4g} ({share})"


def _mean(mean: Average, of: int) -> str:
    if mean.value is None or mean.low is None or mean.high is None:
        return "missing"
    spread = "" if mean.high - mean.low < 0.05 else f" ({mean.low:.1f} to {mean.high:.1f})"
    return f"{mean.value:.1f}{spread}" + (f", {len(mean.of)} of {of}" if mean.missing else "")


def _ambiguous(seen: Sequence[Benchmark]) -> list[str]:
    """What is not known of the benchmarks that are shown."""
    notes = []
    for one in seen:
        several = "; ".join(
            f"{score.name} = {' + '.join(score.metrics)}, {score.why}" for score in one.scores
        )
        text = "; ".join(part for part in (several if len(one.scores) > 1 else "", one.note) if part)
        if text:
            notes.append(f"{one.name}: {text}")
    return notes


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(given: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ocvtp.harness.relative",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, help="the unpruned run's first")
    parser.add_argument("--ten", action="store_true", help="the paper's ten alone, as far as they are known")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write scores, shares and records there too"
    )
    options = parser.parse_args(given)
    rows, failed = [], []
    for folder in options.folders:
        try:
            rows.append(read_row(folder))
        except NoResultsError as error:
            failed.append(str(error))
            if not rows:
                parser.error(f"the first row is what shares are of: {error}")
            rows.append(Row(folder.name, {}, {}, None))
    benchmarks = [one for one in BENCHMARKS if one.name in TEN] if options.ten else list(BENCHMARKS)
    print("\n".join([table(rows, benchmarks), *(f"- {text}" for text in failed)]))
    if options.json is not None:
        options.json.write_text(json.dumps(to_json(rows, benchmarks), indent=1) + "\n", encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
