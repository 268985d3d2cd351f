"""The files of results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
#: The folder of what depends on no device.
COUNTS = "counts"


class BadResultError(ValueError):
    """A file of results that can't be read, or does not tell where it is from."""


@dataclass(frozen=True)
class Result:
    """One measurement file, or one part of a file that holds several.

    Attributes:
        folder: of its device, or :data:`COUNTS`.
        name: of the file, without its ending; of a part, with the part's name.
        data: what it holds.
    """

    folder: str
    name: str
    data: dict[str, Any]

    @property
    def dirty(self) -> bool:
        """Whether the tree that was measured had changes that are in no commit."""
        return str(self.data["commit"]).endswith(("-dirty", "unknown"))

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU was measured."""
        return not self.folder.startswith("cpu-") and self.folder != COUNTS

    @property
    def commit(self) -> str:
        """Short, and marked if there were changes."""
        short = str(self.data["commit"]).partition("-")[0][:8]
        return f"{short} **(uncommitted changes)**" if self.dirty else short

    @property
    def device(self) -> str:
        """In words."""
        if self.folder == COUNTS:
            return "any"
        name = str(self.data["device"])
        return name if self.on_gpu else f"{name}, {self.data['cores']} cores"

    @property
    def versions(self) -> str:
        """Of what computed."""
        names = ("vllm", "torch", "transformers", "triton", "driver", "cuda")
        return ", ".join(f"{name} {self.data[name]}" for name in names if self.data.get(name))

    def __str__(self) -> str:
        return f"measured at {self.commit} on {self.data['date'][:10]}, {self.device}, {self.versions}"


@dataclass(frozen=True)
class Results:
    """All of them."""

    all: Sequence[Result]

    def named(self, name: str) -> list[Result]:
        """Files of this name, GPUs first, then by device."""
        found = [one for one in self.all if one.name == name]
        return sorted(found, key=lambda one: (not one.on_gpu, one.folder))

    def one(self, name: str) -> Result | None:
        """The first of :meth:`named`."""
        return next(iter(self.named(name)), None)


def load(folder: Path = RESULTS) -> Results:
    """All files of results below a folder.

    Raises:
        BadResultError: a file that is no JSON, or lacks commit, date or (but for counts) device.
    """
    return Results([one for path in sorted(folder.glob("*/*.json")) for one in _read(path)])


def _read(path: Path) -> Iterator[Result]:
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise BadResultError(f"{path.parent.name}/{path.name} is no JSON: {error}") from error
    parts = {path.stem: data}
    if isinstance(data, dict) and "commit" not in data and all(isinstance(d, dict) for d in data.values()):
        parts = {f"{path.stem} {name}": part for name, part in data.items()}
    for name, part in parts.items():
        needed = ["commit", "date"] + (["device"] if path.parent.name != COUNTS else [])
        missing = [key for key in needed if not isinstance(part, dict) or not part.get(key)]
        if missing:
            raise BadResultError(
                f"{path.parent.name}/{path.name} ({name}) does not tell {', '.join(missing)}"
            )
        yield Result(path.parent.name, name, part)
