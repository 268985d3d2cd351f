"""What a user asked of :func:`ocvtp.apply`, and what of it can be told to be wrong without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch

from ocvtp.methods.in_llm import Inside, Method
from ocvtp.pruner.pruner import check_options
from ocvtp.pruner.topup import Fill
from ocvtp.vlm.contracts.reducer import Reducer, Rival
from ocvtp.vlm.contracts.selector import Rule
from ocvtp.vlm.contracts.settings import Frames, Layout, Merge, Newlines, Positions, Tower
from ocvtp.watch import OnInvalid, check_on_invalid
from ocvtp_kernels.coverage import check_rounds


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`ocvtp.apply`, where they are explained."""

    pruner: torch.nn.Module | Rule | Rival | Inside | Reducer | None
    keep: int | float | Literal["auto"] = 64
    positions: Positions | Literal["auto"] = "auto"
    seed: int = 0
    backend: str = "auto"
    precision: str = "auto"
    capture: bool | Literal["vision"] = True
    refine: int = 0
    max_error: float | None = None
    budgets: Sequence[int] | None = None
    layout: Layout = "layout"
    newlines: Newlines = "last"
    frames: Frames = "each"
    tower: Tower = "exact"
    columns: bool = False
    merge: Merge | Literal["auto"] = "auto"
    weigh: bool | Literal["auto"] = "auto"
    features: int | Literal["auto", "early", "consumed"] = "auto"
    fill: Fill | Literal["auto"] = "auto"
    inside: Method | None = None
    on_invalid: OnInvalid = "raise"

    def said(self) -> list[str]:
        """Names of the arguments that are not as they come, the pruner aside."""
        rest = [one for one in fields(self) if one.name != "pruner"]
        return [one.name for one in rest if getattr(self, one.name) != one.default]

    def __post_init__(self) -> None:
        object.__setattr__(self, "refine", check_rounds(self.refine))
        check_on_invalid(self.on_invalid)
        object.__setattr__(self, "seed", check_options(self.seed, self.precision))
        for name, kind in (("layout", Layout), ("newlines", Newlines), ("frames", Frames), ("tower", Tower)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(f'"{value}"' for value in get_args(kind))
                raise ValueError(f"{name} must be one of {known}; got {getattr(self, name)!r}")
        if self.fill not in (*get_args(Fill), "auto"):
            known = ", ".join(f'"{value}"' for value in get_args(Fill))
            raise ValueError(f'fill must be one of {known} or "auto"; got {self.fill!r}')
        if self.merge not in (*get_args(Merge), "auto"):
            known = ", ".join(f'"{value}"' for value in get_args(Merge))
            raise ValueError(f'merge must be one of {known} or "auto"; got {self.merge!r}')
        if not isinstance(self.weigh, bool) and self.weigh != "auto":
            raise ValueError(f'weigh must be True, False or "auto"; got {self.weigh!r}')
        if not isinstance(self.capture, bool) and self.capture != "vision":
            raise ValueError(f'capture must be True, False or "vision"; got {self.capture!r}')
        if self.keep == "auto" and isinstance(self.pruner, str | Reducer):
            raise ValueError(f'keep="auto" compares coverage, which needs a pruner, not {self.pruner!r}')
        self._check_inside()

    def _check_inside(self) -> None:
        if self.inside is not None and not hasattr(self.inside, "cuts"):
            raise TypeError(f"inside must be settings of ocvtp.methods.in_llm; got {self.inside!r}")
        if self.inside is not None and self.columns:
            raise ValueError("columns are of the short prompt, which is shorter still inside: columns=False")
        if self.pruner is None:
            if self.inside is None:
                raise TypeError("pruner=None prunes nothing before the language model: say what does inside=")
            asked = [name for name in self.said() if name not in ("inside", "backend")]
            if asked:
                raise ValueError(
                    f"{', '.join(asked)}: for a pruner before the language model, and pruner is None"
                )
