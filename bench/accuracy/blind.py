"""What questions alone give away to a model trained without pictures: measured, or found by the last record.

Such a model is not shipped and takes half an hour to train (``bench/testbed/recipe-blind.json``); no selector
changes what it answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.accuracy.answers import correct_blind
from bench.accuracy.measure import BLIND, Row, plain_row
from bench.accuracy.testset import TestSet


@dataclass(frozen=True)
class Blind:
    """Where its lines come from.

    Attributes:
        model: to be asked, or ``None``.
        last: or else the last record, or ``None``.
    """

    model: Any = None
    last: dict[str, Any] | None = None

    @classmethod
    def of_record(cls, file: Path) -> Blind:
        """What the last record found, if there is one."""
        return cls(last=json.loads(file.read_text(encoding="utf-8"))) if file.exists() else cls()

    @property
    def source(self) -> dict[str, str] | None:
        """Commit and date of a measurement that is not of now."""
        if self.model is not None or self.last is None:
            return None
        return self.last.get("blind") or {name: self.last[name] for name in ("commit", "date")}

    def rows(self, test: TestSet) -> list[Row]:
        """Its line for the questions of ``test``; none if they were never asked."""
        if self.model is not None:
            return [plain_row(test, BLIND, correct_blind(self.model, test))]
        if self.last is None:
            return []
        asked = {"pictures": len(test), "questions": len(test.kinds)}
        if self.last["sets"].get(test.split) != asked:
            return []
        found = [row for row in self.last["rows"] if (row["method"], row["split"]) == (BLIND, test.split)]
        return [Row.from_dict(row) for row in found]
