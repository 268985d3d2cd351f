"""Answers on disk as they come, so that a killed run goes on where it was.

lmms-eval's ``--use_cache`` writes nothing before every task of the command is answered (0.7.3), and knows
neither what an answer cost nor whether the pruner's weights are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ocvtp.stored.lock import lock
from ocvtp.stored.refused import Refused
from ocvtp.stored.strict_json import parse_object


class Journal:
    """A folder of ``<rank>.jsonl``: a line of settings, then a line per batch.

    Any number of processes may have written it, and any other number goes on. A line that a kill cut off is
    left out, so a batch is there as a whole or not at all.

    Args:
        folder: made if it is not there.
        settings: JSON-ready; what has a say in the answers.

    Raises:
        ValueError: the folder has answers under other settings, or a line that is damaged.
    """

    def __init__(self, folder: str, settings: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._answers: dict[str, dict[str, Any]] = {}
        self._file: IO[bytes] | None = None
        for path in sorted(self._folder.glob("*.jsonl")):
            self._read(path)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> dict[str, Any] | None:
        """What was answered, if it was."""
        return self._answers.get(key)

    def add(self, rank: int, answers: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """A batch of keys and answers, by the process of a rank. With the system when this returns."""
        if self._file is None:
            self._file = self._opened(self._folder / f"{rank}.jsonl")
        self._append({"answers": [{"key": key, **answer} for key, answer in answers]})

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _opened(self, own: Path) -> IO[bytes]:
        file = own.open("ab+")
        if not lock(file.fileno()):
            file.close()
            raise ValueError(f"resume: another process is writing {own}: give another folder")
        file.seek(0)
        whole = file.read()
        if b"\n" in whole:  # another run may have begun it since this one looked
            self._check(own, 1, whole.split(b"\n", 1)[0])
        file.truncate(whole.rfind(b"\n") + 1)  # a line that a kill cut off
        self._file = file
        if b"\n" not in whole:
            self._append({"settings": self._settings})
        return file

    def _append(self, content: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")[:-1]  # what a kill cut off has no end
        for number, line in enumerate(lines, 1):
            self._check(path, number, line)

    def _check(self, path: Path, number: int, line: bytes) -> None:
        """The first line is held to the settings, others are taken."""
        try:
            found = parse_object(line)
            self._settle(path, found["settings"]) if number == 1 else self._take(found["answers"])
        except (Refused, KeyError, TypeError) as error:
            raise ValueError(
                f"resume: line {number} of {path} is damaged ({error}): delete that file, whose answers "
                "will be asked for again"
            ) from error

    def _settle(self, path: Path, before: Mapping[str, Any]) -> None:
        other = _differing(before, self._settings)
        if other:
            changed = ", ".join(other)
            raise ValueError(
                f"resume: {path} has answers under other settings ({changed}): give another folder, or "
                "delete this one"
            )

    def _take(self, answers: Sequence[Mapping[str, Any]]) -> None:
        for answer in answers:
            rest = dict(answer)
            self._answers[rest.pop("key")] = rest


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """Names of what is not the same, dotted."""
    found = []
    for name in sorted({*before, *now}):
        ours, theirs = now.get(name), before.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += _differing(theirs, ours, f"{where}{name}.")
        elif ours != theirs:
            found.append(f"{where}{name}")
    return found
