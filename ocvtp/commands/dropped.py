"""What a person asked about dropped tokens, and about the features that rules compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from ocvtp.commands.errors import UserError

#: The two ways that the demo shows: dropped tokens are gone, or kept ones stand for them in full.
THROWN_AWAY: dict[str, Any] = {"merge": "off", "weigh": False}
STOOD_FOR: dict[str, Any] = {"merge": "projected", "weigh": True}

_WORDS = ("auto", "early", "consumed")


@dataclass(frozen=True)
class Wishes:
    """Options of :func:`ocvtp.apply`; ``None`` where nothing was said, which leaves it to ``apply``.

    Attributes:
        merge: where dropped tokens are averaged into kept ones.
        weigh: whether the language model knows how many a kept one stands for.
        features: what a rule compares: ``"early"``, ``"consumed"``, ``"auto"`` or a layer in digits.
    """

    merge: str | None = None
    weigh: bool | None = None
    features: str | None = None

    def options(self) -> dict[str, Any]:
        """Those that were said, as ``apply`` takes them.

        Raises:
            UserError: features that are neither a word it knows nor a layer.
        """
        said = {"merge": self.merge, "weigh": self.weigh, "features": self._features()}
        return {name: value for name, value in said.items() if value is not None}

    def check(self, pruner: str) -> None:
        """What can be told without a model.

        Raises:
            UserError: features for somebody who compares none, or that are none.
        """
        from ocvtp.vlm.contracts.selector import Rule, reads_features

        if self._features() in (None, "auto"):
            return
        able = [rule for rule in get_args(Rule) if reads_features(rule)]
        if pruner not in able:
            raise UserError(
                f"--features is for rules that compare some ({', '.join(able)}), not for {pruner!r}: leave "
                "it out"
            )

    def check_layer(self, consumed: int) -> None:
        """Whether the tower has the layer in time, of which the deepest that is read is ``consumed``.

        Raises:
            UserError: it has not.
        """
        layer = self._features()
        if isinstance(layer, int) and layer > consumed:
            raise UserError(
                f"--features must be between 0 and {consumed}, the encoder layer that this model's language "
                f"model reads; got {layer}"
            )

    def _features(self) -> int | str | None:
        given = self.features
        if given is None or given in _WORDS:
            return given
        if not (given.isascii() and given.isdigit()):
            raise UserError(f"--features must be early, consumed or the number of a layer; got {given!r}")
        return int(given)
