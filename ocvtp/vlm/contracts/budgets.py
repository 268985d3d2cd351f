"""How many tokens to keep of an image: a number, a share, or as few as cover it well enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ocvtp.pruner.budget import check_budgets, share_of
from ocvtp_kernels._checks import as_float, require_count


@dataclass(frozen=True)
class Budget:
    """What ``keep`` means for an image of any size.

    Attributes:
        keep: a number of tokens, a share ``0 < keep <= 1.0`` of them, or ``"auto"``.
        max_error: for ``"auto"``, see :class:`ocvtp.OCPruner`.
        budgets: for ``"auto"``, ascending.

    Raises:
        TypeError, ValueError: anything else.
    """

    keep: int | float | Literal["auto"] = 64
    max_error: float | None = None
    budgets: Sequence[int] | None = None

    def __post_init__(self) -> None:
        share = as_float(self.keep)
        own = check_budgets(self.keep if share is None else share, self.max_error, self.budgets)
        if own is not None:
            object.__setattr__(self, "max_error", own[0])
            object.__setattr__(self, "budgets", tuple(own[1]))
        elif share is not None:
            share_of(share, 1)
            object.__setattr__(self, "keep", share)
        else:
            object.__setattr__(self, "keep", require_count("keep", self.keep, 2**31, "any image has"))

    def check(self, tokens: int) -> None:
        """Raise ``ValueError`` if images that all have ``tokens`` can't keep that many."""
        if isinstance(self.keep, int):
            require_count("keep", self.keep, tokens, "the image tokens of this model")
        elif self.budgets is not None and self.budgets[-1] > tokens:
            raise ValueError(
                f"budgets must be at most {tokens}, the image tokens of this model; got {list(self.budgets)}"
            )

    def of(self, tokens: int) -> int | tuple[int, ...]:
        """Tokens to keep of an image of ``tokens``, or budgets to choose from. A smaller image keeps all."""
        if self.keep == "auto":
            assert self.budgets is not None
            fitting = tuple(budget for budget in self.budgets if budget < tokens)
            return fitting if len(fitting) == len(self.budgets) else (*fitting, tokens)
        if isinstance(self.keep, float):
            return share_of(self.keep, tokens)
        assert isinstance(self.keep, int)
        return min(self.keep, tokens)

    def __str__(self) -> str:
        if self.keep == "auto":
            assert self.budgets is not None
            shown = ", ".join(str(budget) for budget in self.budgets)
            return f"the smallest of {shown} with coverage error <= {self.max_error}"
        return f"{self.keep:.1%}" if isinstance(self.keep, float) else str(self.keep)
