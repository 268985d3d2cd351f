"""What is predicted, what the kernels are to take on an H100, and what the model says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bench.snapshot import FOLDER

PATH = FOLDER / "predict.json"
#: What the file may hold, in this order.
NAMES = ("before", "after", "by rows")
#: "after", with tiles by number of rows: once a GPU has shown that they compute the same bits.
BY_ROWS = "by rows"
#: Part of a call -> what it is.
SECTIONS = {
    "slots": "features to every slot's top token",
    "received": "received attention of the consumed layer, CLIP-L",
    "exposed": "between the tower's last layer and the projector, LLaVA-1.5",
    "captured": "slots as a graph replays them, with what is copied in and out",
}


class Target(NamedTuple):
    """A section of a call, at one size, and the most microseconds that it may take."""

    name: str
    size: str
    section: str
    most: float


TARGETS = (
    Target("slots, B = 1", "B=1 N=576 K=64", "slots", 75.0),
    Target("slots, B = 64", "B=64 N=576 K=64", "slots", 700.0),
    Target("exposed, B = 1", "B=1 N=576 K=64", "exposed", 15.0),
)


def totals(section: Mapping[str, Any]) -> tuple[float, ...]:
    """Microseconds of a section, at each rate of L2."""
    return tuple(map(sum, zip(*(row["total_us"] for row in section.values()), strict=True)))


class Verdict(NamedTuple):
    """What the model says of one target, at each rate of L2; ``met``: at all of them."""

    name: str
    most: float
    predicted: tuple[float, ...]
    met: bool

    @property
    def said(self) -> str:
        """In words."""
        values = " and ".join(f"{value:.1f}" for value in self.predicted)
        return f"predicted {values} us, at most {self.most:g}: {'met' if self.met else 'MISSED'} (a model)"


def verdicts(part: Mapping[str, Any]) -> Iterator[Verdict]:
    """Of each target whose size was predicted."""
    for target in TARGETS:
        section = part["cases"].get(target.size, {}).get(target.section)
        if section is not None:
            found = totals(section)
            yield Verdict(target.name, target.most, found, max(found) <= target.most)
