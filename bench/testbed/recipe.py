"""What a training run is: sizes, stages and seed, read from JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bench.testbed.model import Size
from bench.testbed.scenes import THINGS


@dataclass(frozen=True)
class Stage:
    """A part of training, with its own optimiser and a learning rate that rises, then falls to nothing.

    Attributes:
        name: for the log.
        steps: of the optimiser.
        batch: pictures of a step.
        questions: asked about every picture; none trains the tower alone.
        dense: weight of naming what every patch shows.
        learning_rate: at its highest, of AdamW, which trains vectors, embeddings and what reads them out.
        muon: the same of Muon, which trains the matrices inside layers.
        warmup: steps until then.
        crowded: whether pictures are full of things.
        things: least and most in a picture, unless crowded. With few, questions are about whatever there is,
            and what to read is learnt before where to look.
        tower: share of the learning rates that the tower gets; 0 leaves it as it is, which is faster.
    """

    name: str
    steps: int
    batch: int
    questions: int
    dense: float
    learning_rate: float
    muon: float
    warmup: int = 100
    crowded: bool = False
    things: tuple[int, int] = THINGS
    tower: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        seed: of fresh weights and of the stretching of positions.
        size: of the model.
        stages: one after the other; each sees pictures that no stage before it saw.
        weight_decay: on matrices, in AdamW.
        stretched: share of pictures whose tokens stand closer together than one position (down to a
            twentieth). A large language model has met an image and a question at any distance; this one
            would only know the one, and pruning changes it.
        blind: train the language model alone, without pictures: what questions give away.
        validate_every: steps.
        validation: pictures.
    """

    seed: int = 0
    size: Size = field(default_factory=Size)
    stages: tuple[Stage, ...] = ()
    weight_decay: float = 0.05
    stretched: float = 0.5
    blind: bool = False
    validate_every: int = 500
    validation: int = 200

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """From a JSON file; errors as :meth:`from_dict`."""
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """From what :meth:`to_dict` made, or a part of it.

        Raises:
            ValueError: a field that there is not, or no stage.
        """
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise ValueError(f"a recipe has no field(s) {unknown}")
        if not values.get("stages"):
            raise ValueError("a recipe needs stages")
        stages = tuple(
            Stage(**{**stage, "things": tuple(stage.get("things", THINGS))}) for stage in values["stages"]
        )
        return cls(**{**values, "stages": stages, "size": Size(**values.get("size", {}))})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values
