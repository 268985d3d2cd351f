"""What methods that cut once have in common."""

from __future__ import annotations

from ocvtp.methods.in_llm.ranking import kept_of


class OneCut:
    """Settings with one cut. A dataclass adds the fields."""

    layer: int
    keep: int | float

    @property
    def cuts(self) -> tuple[int, ...]:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""
        return (self.layer,)

    def left(self, cut: int, present: int, total: int) -> tuple[int, int]:
        """See :class:`~ocvtp.methods.in_llm.contract.Method`."""
        return kept_of(self.keep, present), 0
