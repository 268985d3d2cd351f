"""Who is compared: the server as it is, and pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.e2e.methods import RULES, UNPRUNED
from ocvtp.vlm.contracts.selector import DEFAULT_RULE

#: ``ocvtp serve`` with a pruner, and without one.
WITH_PRUNER = "ocvtp, pruner"
BY_RULE = f"ocvtp, {next((name for name, rule in RULES.items() if rule == DEFAULT_RULE), DEFAULT_RULE)}"


@dataclass(frozen=True)
class Contender:
    """One server.

    Attributes:
        name: as it is recorded.
        settings: of ``ocvtp serve``; ``None`` for vLLM as it is.
    """

    name: str
    settings: Mapping[str, Any] | None

    @property
    def keep(self) -> int | None:
        """Image tokens that are left."""
        return None if self.settings is None else self.settings["keep"]


def contenders(keep: int, pruner: Path) -> list[Contender]:
    """Unpruned, by a pruner in a folder, and by the rule that chooses where nobody says who."""
    return [
        Contender(UNPRUNED, None),
        Contender(WITH_PRUNER, {"keep": keep, "pruner": str(pruner)}),
        Contender(BY_RULE, {"keep": keep}),
    ]
