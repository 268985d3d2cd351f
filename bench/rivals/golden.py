"""A file of golden tensors, and what was made of each of its sub-cases."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

#: How far a value may be from the official one. Met on the machine that made them; others may need twice it.
TOLERANCE = 1e-5


@dataclass
class Golden:
    """One file.

    Attributes:
        path: where it is.
        about: what it says of itself: the JSON in its metadata, under ``config`` if it holds sub-cases, or
            under ``case`` if it is one.
        tensors: by key, ``<sub-case>.<tensor>``; a key without a dot serves all sub-cases.
        tolerance: how far a value may be away.
        is_one_case: dots in its keys divide no sub-cases.
        looked_at: keys that something was computed from or compared with, or that need no look.
        owed: keys that only a run of a whole tower can be compared with, until one was.
    """

    path: Path
    about: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    tolerance: float = TOLERANCE
    is_one_case: bool = False
    looked_at: set[str] = field(default_factory=set)
    owed: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path, tolerance: float = TOLERANCE) -> Golden:
        """The file at ``path``.

        Raises:
            ValueError: it doesn't say what it holds.
        """
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            written = metadata.get("config", metadata.get("case"))
            if written is None:
                raise ValueError('its metadata has neither "config" nor "case"')
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
            return cls(path, json.loads(written), tensors, tolerance, "config" not in metadata)

    @property
    def name(self) -> str:
        """Of the file, without its ending."""
        return self.path.stem

    def cases(self) -> list[str]:
        """Sub-cases: what stands before dots; without any, what has parameters. "" is the whole file."""
        if self.is_one_case:
            return [""]
        names = sorted({key.split(".")[0] for key in self.tensors if "." in key})
        return names or sorted(self.about.get("params", {})) or [""]

    def unseen(self) -> list[str]:
        """Keys that nothing looked at."""
        return sorted(set(self.tensors) - self.looked_at)


@dataclass
class Case:
    """One sub-case in one precision, and what came of it.

    Attributes:
        golden: its file.
        name: before the dot of its keys.
        dtype: that floating-point tensors are given in.
        compared: how many tensors were.
        worst: the largest difference of a value.
        wrong: one line for each tensor that differs.
    """

    golden: Golden
    name: str
    dtype: torch.dtype
    compared: int = 0
    worst: float = 0.0
    wrong: list[str] = field(default_factory=list)

    @property
    def params(self) -> dict[str, Any]:
        """Budgets and settings of the sub-case."""
        params = self.golden.about.get("params", {})
        return params.get("runs", params).get(self.name, {})

    @property
    def fixed(self) -> bool:
        """Whether what the official code makes of the sub-case is an accident or a failure."""
        return str(self.params.get("expect", self.golden.about.get("expect", ""))).startswith("fixed")

    def __contains__(self, key: str) -> bool:
        return self._key(key) in self.golden.tensors

    def __getitem__(self, key: str) -> torch.Tensor:
        """The tensor, floating point in ``dtype``: an input."""
        tensor = self._stored(key)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def get(self, key: str) -> torch.Tensor | None:
        """The tensor as an input, ``None`` if there is none."""
        return self[key] if key in self else None  # noqa: SIM401 (this is it)

    def beside(self, name: str) -> Case:
        """Tensors of another file of the folder, in the same precision.

        Raises:
            FileNotFoundError: it isn't there.
        """
        path = self.golden.path.with_name(f"{name}.safetensors")
        if not path.is_file():
            raise FileNotFoundError(f"{path.name} must lie beside it")
        return Case(Golden.read(path), "", self.dtype)

    def pair(self, key: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Compare what a tower was run for: a part, or another order, of the tensor called ``key``."""
        self.golden.owed.discard(key)
        if expected.is_floating_point():
            self._close(key, found, expected, self.golden.tolerance)
        else:
            self.same(key, found, expected)

    def same(self, key: str, found: torch.Tensor, expected: torch.Tensor | None = None) -> None:
        """Compare indices: all must be equal."""
        stored = self._stored(key)
        expected = stored if expected is None else expected
        self.compared += 1
        if found.shape != expected.shape:
            self._differs(key, f"shape {list(found.shape)}, expected {list(expected.shape)}")
        elif not torch.equal(found, expected):
            places = (found != expected).nonzero().tolist()
            first = tuple(places[0])
            self._differs(
                key,
                f"{len(places)} of {expected.numel()} indices differ, first at {list(first)}: "
                f"{found[first]}, expected {expected[first]}",
            )

    def same_set(self, key: str, found: torch.Tensor) -> None:
        """Compare indices ``[B, n]`` whatever their order in a row."""
        self.same(key, found.sort(dim=1).values, self._stored(key).sort(dim=1).values)

    def close(self, key: str, found: torch.Tensor, tolerance: float | None = None) -> None:
        """Compare values: all must be within the tolerance."""
        self._close(key, found, self._stored(key), tolerance)

    def _close(self, key: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float | None) -> None:
        expected = expected.double()
        limit = self.golden.tolerance if tolerance is None else tolerance
        self.compared += 1
        if found.shape != expected.shape:
            self._differs(key, f"shape {list(found.shape)}, expected {list(expected.shape)}")
            return
        error = (found.double() - expected).abs()
        worst = error.max().item() if error.numel() else 0.0
        if tolerance != 0.0:
            self.worst = max(self.worst, worst)
        if not worst <= limit:  # NaN is not
            self._differs(key, f"off by {worst:.2e}, more than {limit:.0e}")

    def equal(self, what: str, found: object, expected: object) -> None:
        """Compare what the file's parameters say."""
        self.compared += 1
        if found != expected:
            self._differs(what, f"{found!r}, expected {expected!r}")

    def needless(self, *keys: str) -> None:
        """Tensors that need no look: official accidents, or inputs of a step whose result is stored too."""
        for key in keys:
            if key in self:
                self._stored(key)

    def needs_tower(self, *keys: str) -> None:
        """Tensors that :mod:`bench.rivals.from_pixels` compares."""
        for key in keys:
            if key in self:
                self._stored(key)
                self.golden.owed.add(self._key(key))

    def _key(self, key: str) -> str:
        own = f"{self.name}.{key}"
        return own if own in self.golden.tensors else key

    def _stored(self, key: str) -> torch.Tensor:
        found = self._key(key)
        if found not in self.golden.tensors:
            raise KeyError(f"{self.golden.path.name} has no {self.name}.{key}")
        self.golden.looked_at.add(found)
        return self.golden.tensors[found]

    def _differs(self, key: str, how: str) -> None:
        self.wrong.append(f"{self._key(key)} ({str(self.dtype).removeprefix('torch.')}): {how}")
