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

from ocvtp.harness.agreement import cached, departures, differences, incomplete, timings
from ocvtp.harness.protocol import BENCHMARKS, TEN, Benchmark, Score
from ocvtp.harness.results import NoResultsError, Row, part, read_row

_HOW = "mean of 100 x score / unpruned score"


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
    """Over the benchmarks of which row and base have a share by the first score, one score each."""
    found = shares(row, base)
    there = [one for one in benchmarks if (one.name, one.scores[0].name) in found]
    missing = tuple(one.name for one in benchmarks if one not in there)
    if not there:
        return Average(None, None, None, (), missing)
    choices = [
        [found[one.name, score.name] for score in one.scores if (one.name, score.name) in found]
        for one in there
    ]
    means = [statistics.fmean(combination) for combination in itertools.product(*choices)]
    return Average(means[0], min(means), max(means), tuple(one.name for one in there), missing)


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
    head = ["", "method", "tokens", "s/image", *(_title(*column) for column in columns)]
    head.append(f"average of {len(seen)}")
    lines = [_line(head), _line(["---", "---", *["---:"] * (len(head) - 2)])]
    notes = []
    for row in rows:
        found, mean = shares(row, base), average(row, base, seen)
        cells = [_cell(row, found, (one.name, score.name)) for one, score in columns]
        seconds = row.measured("seconds_per_image")
        lines.append(
            _line(
                [
                    row.label,
                    _method(row),
                    _tokens(row),
                    "" if seconds is None else f"{seconds:.4g}",
                    *cells,
                    _mean(mean, len(seen)),
                ]
            )
        )
        if mean.missing:
            notes.append(f"{row.label}: not in the average: {', '.join(mean.missing)}")
    notes += _shared(rows, seen)
    never = [one.name for one in benchmarks if one not in seen]
    if never:
        notes.append(f"no run has results of {', '.join(never)}")
    notes += _ambiguous(seen) + departures(rows, seen) + incomplete(rows) + cached(rows)
    notes += differences(rows) + timings(rows)
    about = (
        f"In brackets: percent of the unpruned score. average: {_HOW}, by the first score of each benchmark, "
        "and in brackets the range over all choices of scores. tokens: mean vision tokens of an image that "
        "enter the language model, and in brackets the mean over its layers, where some are dropped inside. "
        "s/image: around `generate`. Scores are on lmms-eval's scales."
    )
    return "\n".join([*lines, "", about, *(f"- {note}" for note in notes)])


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


def _shared(rows: Sequence[Row], seen: Sequence[Benchmark]) -> list[str]:
    """Averages over the same benchmarks, where those in the table are over different ones."""
    of = [average(row, rows[0], seen).of for row in rows]
    common = [one for one in seen if all(one.name in names for names in of)]
    if not any(of) or all(names == of[0] for names in of):
        return []
    if not common:
        return ["averages are over different benchmarks, and there is none that all rows have"]
    again = [(row.label, average(row, rows[0], common).value) for row in rows]
    said = ", ".join(f"{label} {value:.1f}" for label, value in again if value is not None)
    return [
        "averages are over different benchmarks; over those that all rows have "
        f"({', '.join(one.name for one in common)}): {said}"
    ]


def _method(row: Row) -> str:
    """Who chose how many, as the run's record has it."""
    if row.record is None:
        return ""
    settings = part(row.record, "settings")
    chosen = str(part(row.record, "pruner").get("name", "")).rstrip("/").rsplit("/", 1)[-1]
    said = [chosen if row.record.get("report") is None else f"{chosen} {settings.get('keep')}"]
    if settings.get("inside"):
        said.append(str(part(settings, "inside").get("name")))
    if settings.get("merge") not in (None, "off"):
        said.append("merged" + (" and weighed" if settings.get("weigh") else ""))
    return ", ".join(said)


def _tokens(row: Row) -> str:
    entering = row.measured("kept_vision_tokens_per_image")
    within = row.measured("vision_tokens_per_image_in_layers")
    if entering is None:
        return ""
    inside = within is not None and abs(within - entering) >= 0.05
    return f"{entering:.1f}" + (f" ({within:.1f})" if inside else "")


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
        text = "; ".join(said for said in (several if len(one.scores) > 1 else "", one.note) if said)
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
    names = [folder.resolve().name for folder in options.folders]
    for folder, name in zip(options.folders, names, strict=True):
        label = name if names.count(name) == 1 else str(folder)
        try:
            rows.append(read_row(folder, label))
        except NoResultsError as error:
            failed.append(str(error))
            if not rows:
                parser.error(f"the first row is what shares are of: {error}")
            rows.append(Row(label))
    benchmarks = [one for one in BENCHMARKS if one.name in TEN] if options.ten else list(BENCHMARKS)
    print("\n".join([table(rows, benchmarks), *(f"- {text}" for text in failed)]))
    if options.json is not None:
        text = json.dumps(to_json(rows, benchmarks), indent=1)
        try:
            options.json.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            parser.error(f"--json {options.json}: {error.strerror or error}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
