"""Who is compared, and what ``ocvtp.apply`` takes to have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ocvtp import OCPruner
from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.rivals.by_attention import Salient
from ocvtp.vlm.rivals.catalog import METHODS

_PLAIN = {"merge": "off", "weigh": False}
_BOTH = {"merge": "projected", "weigh": True}
#: The product as it comes; what every other line is held against.
DEFAULT = "ocvtp, default"
EVERYTHING = "all tokens"


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        name: of it.
        pruner: what ``apply`` takes; ``None`` prunes nothing.
        options: what else it takes.
        seeds: draws that differ.
        asks: whether what is kept depends on the question.
        note: what is not as published.
    """

    name: str
    pruner: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 1
    asks: bool = False
    note: str = ""


def contenders(pruners: Mapping[str, OCPruner]) -> list[Contender]:
    """All of them; the product's default comes second, after all tokens.

    Args:
        pruners: ours by name: ``"early"`` and ``"consumed"``.
    """
    found = [
        Contender(EVERYTHING, None),
        Contender(DEFAULT, "greedy_dpp", _BOTH),
        Contender("ocvtp, pruner of the consumed layer", pruners["consumed"], _BOTH),
        Contender("OC-VTP as published", pruners["early"], _PLAIN),
        Contender("random", "random", _PLAIN, seeds=3),
    ]
    for method in METHODS.values():
        found += _lines(method)
    return found


def _lines(kind: type[Reducer]) -> Sequence[Contender]:
    """A method as published; by attention received where it reads the class token's, which nobody taught
    anything here; and, if it only chooses, with dropped tokens merged and weighed as ours are."""
    reads = kind.reads_text
    made: dict[str, tuple[Any, str]] = {}
    if reads:
        adapted = "relevance by the language model's embeddings: there is no text tower here"
        made[kind.title] = kind("language_model"), adapted  # type: ignore[call-arg]
    elif kind.name.startswith("prumerge"):
        made[kind.title] = kind(), "attention of the consumed layer, the tower's last; a fixed budget"
    else:
        made[kind.title] = kind(), ""
    if issubclass(kind, Salient):
        made[f"{kind.title}, by attention received"] = kind(by="received"), "our adaptation"
    found = []
    for name, (method, note) in made.items():
        found.append(Contender(name, method, asks=reads, note=note))
        if not kind.merges:
            found.append(Contender(f"{name}, merged and weighed", method, _BOTH, asks=reads, note=note))
    return found
