"""What is not the same in rows, so that a share of two scores compares other things than pruning."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ocvtp.harness.protocol import BENCHMARKS, Benchmark
from ocvtp.harness.results import FREE, Row, command, part, questions, record_in

#: Settings of ours that change what is asked, or in which numbers it is answered.
_SETTINGS = (
    "dtype",
    "attn_implementation",
    "system_prompt",
    "chat_template",
    "pad_to_square",
    "image_grid_pinpoints",
    "min_pixels",
    "max_pixels",
    "max_new_tokens",
)
#: Of lmms-eval's command.
_COMMAND = ("model", "limit", "offset", "gen_kwargs", "num_fewshot", "system_instruction")
#: Of a task: its data, its words, and how answers are scored.
_TASK = (
    "dataset_path",
    "dataset_name",
    "test_split",
    "generation_kwargs",
    "lmms_eval_specific_kwargs",
    "metric_list",
)
_LONG = 40

#: By fact, then by its value as text, the rows that have it.
_Said = dict[str, dict[str, list[str]]]


def differences(rows: Sequence[Row]) -> list[str]:
    """Notes for below the table, one for everything that rows don't have in common; none: they agree."""
    base = rows[0]
    notes = []
    if base.record is not None and base.record.get("report") is not None:
        notes.append(f"the first row, {base.label}, is pruned itself: shares are of that")
    notes += [text for row in rows for text in _mixed(row)]
    said: _Said = {}
    for row in rows:
        for whole in row.runs:
            for name, value in _facts(whole).items():
                _note(said, name, value, row.label)
        for task, number in sorted(row.counts.items()):
            _note(said, f"number of {task}'s questions", number, row.label)
        for task, config in sorted(row.tasks.items()):
            for name in _TASK if config else ():
                _note(said, f"{name} of {task}", _plain(config.get(name)), row.label)
    notes += _lines(said, "not the same thing is compared: ")
    without = [row.label for row in rows if row.runs and len(row.records) < len(row.runs)]
    if without:
        notes.append(f"settings and versions are not known, or not of every run: {', '.join(without)}")
    return notes


def departures(rows: Sequence[Row], benchmarks: Sequence[Benchmark] = BENCHMARKS) -> list[str]:
    """Notes about rows that were asked or scored otherwise than the protocol has it."""
    notes = []
    for one in benchmarks:
        if one.wanted is None:
            continue
        runs = [(row.label, row.tasks[one.task]) for row in rows if one.task in row.tasks]
        other = [label for label, task in runs if task and not one.wanted.holds(task)]
        if other:
            notes.append(f"not the protocol's: {one.name} is {one.wanted.otherwise} in {', '.join(other)}")
        if unknown := [label for label, task in runs if not task]:
            notes.append(f"whether {one.name} is the protocol's is not known in {', '.join(unknown)}")
    return notes


def incomplete(rows: Sequence[Row]) -> list[str]:
    """Notes about rows in which not all questions were asked."""
    said: dict[str, list[str]] = {}
    for row in rows:
        short = [f"{number} of {of} questions of {task}" for task, (number, of) in sorted(row.parts.items())]
        notes = [f"not all questions were asked: {', '.join(short)}"] if short else []
        for whole in row.runs:
            if not any(of is not None and number < of for number, of in questions(whole).values()):
                notes += [f"lmms-eval was called with {option}" for option in _cutting(whole)]
        for note in dict.fromkeys(notes):
            said.setdefault(note, []).append(row.label)
    return [f"{note} (in {', '.join(labels)})" for note, labels in said.items()]


def _cutting(whole: Mapping[str, Any]) -> list[str]:
    given = command(whole)
    found = [(name, given.get(name)) for name in ("limit", "offset")]
    return [f"--{name} {value}" for name, value in found if value and value != -1]  # -1: all


def cached(rows: Sequence[Row]) -> list[str]:
    """A note about rows whose answers may be those of other weights."""
    found = [row.label for row in rows if any(map(_cached, row.runs))]
    if not found:
        return []
    return [
        f"answers may be from lmms-eval's cache (--use_cache) in {', '.join(found)}: its key knows neither "
        "the pruner's weights nor ocvtp's version, and what is from there has no tokens and no seconds"
    ]


def _cached(whole: Mapping[str, Any]) -> bool:
    """Whether lmms-eval was told a cache, or our model answered less than was scored."""
    if command(whole).get("use_cache"):
        return True
    record = record_in(whole)
    if record is None:
        return False
    answered = part(record, "measured").get("requests", 0)
    return bool(answered < sum(number for number, _ in questions(whole).values())) or not answered


def timings(rows: Sequence[Row]) -> list[str]:
    """Notes about seconds that were not measured alike."""
    said: _Said = {}
    for row in rows:
        for record in row.records:
            if "seconds_per_image" not in part(record, "measured"):
                continue
            _note(said, "device", record.get("device"), row.label)
            _note(said, "batch_size", part(record, "settings").get("batch_size"), row.label)
    return _lines(said, "seconds can't be compared: ")


def _mixed(row: Row) -> list[str]:
    """A folder with results of several settings is no row."""
    said: _Said = {}
    for record in row.records:
        for name, value in part(record, "settings").items():
            if name not in FREE:
                _note(said, name, value, "")
        _note(said, "the pruner's weights", part(record, "pruner").get("sha256"), "")
    mixed = [name for name, values in said.items() if len(values) > 1]
    return [f"{row.label} holds runs of several settings: {', '.join(mixed)}"] if mixed else []


def _facts(whole: Mapping[str, Any]) -> dict[str, Any]:
    given = command(whole)
    # An empty string and nothing are the same to lmms-eval.
    facts: dict[str, Any] = {name: given[name] or None for name in _COMMAND if name in given}
    record = record_in(whole)
    if record is not None:
        # Records of older versions lack some of these, and who reads no question has no text encoder.
        facts |= {
            name: value
            for name, value in (
                ("the model's configuration", part(record, "model").get("config_sha256")),
                ("the text encoder", record.get("text_encoder_sha256")),
                ("the processor", part(record, "processor").get("sha256")),
                ("the generation configuration", record.get("generation")),
            )
            if value is not None
        }
        pictures = part(part(record, "processor"), "image_processor")
        facts |= {f"{name} of the image processor": value for name, value in pictures.items()}
        facts["the model's weights"] = part(record, "model").get("sample_sha256")
        facts |= {name: part(record, "settings").get(name) for name in _SETTINGS}
        facts |= {f"version of {name}": value for name, value in part(record, "versions").items()}
    return facts


def _note(said: _Said, name: str, value: Any, label: str) -> None:
    by = said.setdefault(name, {}).setdefault(_text(value), [])
    if label not in by:
        by.append(label)


def _lines(said: _Said, start: str) -> list[str]:
    return [
        f"{start}{name} is " + ", ".join(f"{value} in {', '.join(by)}" for value, by in values.items())
        for name, values in said.items()
        if len(values) > 1
    ]


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    if len(text) <= _LONG:
        return text
    # Long texts may differ where one doesn't look.
    return f"{text[:_LONG]!r}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def _plain(value: Any) -> Any:
    """Without addresses of functions, which no two processes share."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return re.sub(r" at 0x[0-9a-f]+", "", value) if isinstance(value, str) else value
