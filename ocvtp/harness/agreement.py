"""What is not the same in rows, so that a share of two scores compares other things than pruning."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ocvtp.harness.results import Row, part, record_in

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
#: What makes two runs of one row the same setting.
_SETTING = ("pruner", "keep", "inside", "merge", "weigh", "seed", "layer", "settings")
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


def timings(rows: Sequence[Row]) -> list[str]:
    """Notes about seconds that were not measured alike."""
    said: _Said = {}
    for row in rows:
        for record in row.records:
            _note(said, "device", record.get("device"), row.label)
            _note(said, "batch_size", part(record, "settings").get("batch_size"), row.label)
    return _lines(said, "seconds can't be compared: ")


def _mixed(row: Row) -> list[str]:
    """A folder with results of several settings is no row."""
    said: _Said = {}
    for record in row.records:
        for name in _SETTING:
            _note(said, name, part(record, "settings").get(name), "")
        _note(said, "the pruner's weights", part(record, "pruner").get("sha256"), "")
    mixed = [name for name, values in said.items() if len(values) > 1]
    return [f"{row.label} holds runs of several settings: {', '.join(mixed)}"] if mixed else []


def _facts(whole: Mapping[str, Any]) -> dict[str, Any]:
    config = part(whole, "config")
    command = {**part(config, "resolved_cli_args"), **config}
    # An empty string and nothing are the same to lmms-eval.
    facts: dict[str, Any] = {name: command[name] or None for name in _COMMAND if name in command}
    record = record_in(whole)
    if record is not None:
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
