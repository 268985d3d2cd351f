"""What a user asked for, as it travels in the model's configuration to every process of a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from ocvtp.pruner import OCPruner
from ocvtp.pruner.sources import read_pruner
from ocvtp.vlm.contracts.selector import DEFAULT_RULE, Rule
from ocvtp.vlm.options import Options
from ocvtp_kernels._backend import Backend
from ocvtp_kernels._checks import as_int

#: Of the settings in ``hf_config``.
KEY = "ocvtp"

_ATTENTION = (
    "proportional attention adds numbers to attention logits, for which vLLM's kernels have no place: leave "
    "weigh out. Dropped tokens are averaged into kept ones all the same (merge)"
)
_TOWER = "vLLM runs its own vision tower, whole"
#: Options of :func:`ocvtp.apply` that a server can't have: what it does as if they had said, and why.
_NOT_HERE: dict[str, tuple[tuple[object, ...], str]] = {
    "weigh": ((False, "auto"), _ATTENTION),
    "tower": (("exact",), _TOWER),
    "layout": (("layout",), "vLLM packs tiles as the model does"),
    "positions": (("auto",), "vLLM numbers the tokens of a prompt itself"),
    "frames": (("each",), "only images are pruned, and videos are refused"),
    "columns": ((False,), "a server returns text"),
    "capture": ((False,), "vLLM captures graphs of its own"),
    "budgets": ((None,), 'they belong to keep="auto"'),
    "max_error": ((None,), 'it belongs to keep="auto"'),
    "inside": (
        (None,),
        "vLLM's paged cache holds as many tokens in every layer, and its kernels return no attention",
    ),
}


@dataclass(frozen=True)
class Spec:
    """Settings of one engine. Names and meaning are those of :func:`ocvtp.apply`, but for the first two.

    Attributes:
        keep: tokens to keep per image, or a share of them. Where every tile or crop of an image is chosen
            from by itself (InternVL, Idefics3, SmolVLM, Gemma 3), per tile.
        pruner: folder, Hub id or official weights file of an OCPruner, or a rule.
        layer: encoder layer that official weights were trained on, which they don't say.
        seed: of the slots' noise, or of ``pruner="random"``.
        refine: rounds of refinement.
        features: what rules compare.
        fill: what tops a pruner's tokens up.
        merge: where dropped tokens go: ``"auto"`` is ``"projected"``; or ``"off"``.
        newlines: of packed tiles, the ``"last"`` or ``"all"``.
        backend: of fused operations.
        precision: of the pruner's products.
        on_invalid: what is done about images with NaN or Inf. Not ``"raise"`` here, unless it is said: an
            error in the worker ends the server, for all who use it.
    """

    keep: int | float = 64
    pruner: str = DEFAULT_RULE
    layer: int | None = None
    seed: int = 0
    refine: int = 0
    features: int | str = "auto"
    fill: str = "auto"
    merge: str = "auto"
    newlines: str = "last"
    backend: str = "auto"
    precision: str = "auto"
    on_invalid: str = "grid"

    @classmethod
    def from_dict(cls, given: Any) -> Spec:
        """Settings as they stand in ``--hf-overrides '{"ocvtp": {...}}'``.

        Raises:
            TypeError, ValueError: none, an unknown one, one that a server can't have, or one that makes no
                sense. Whether they suit a model is not looked at.
        """
        if not isinstance(given, Mapping):
            raise ValueError(
                'an Ocvtp... architecture needs settings: --hf-overrides \'{"architectures": [...], '
                f'"{KEY}": {{"keep": 64}}}}\', which `ocvtp serve --print` writes; got {given!r}'
            )
        given = dict(given)
        for name, (harmless, why) in _NOT_HERE.items():
            if name in given and given.pop(name) not in harmless:
                raise ValueError(f"{name} can't be set when vLLM serves: {why}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"unknown {KEY} setting(s) {', '.join(unknown)}; there are {', '.join(known)}")
        spec = cls(**given)
        spec._check()
        return spec

    def _check(self) -> None:
        if self.keep == "auto":
            raise ValueError('keep="auto" is not available: vLLM counts tokens before it has seen the image')
        if not isinstance(self.pruner, str) or not self.pruner.strip():
            raise TypeError(
                f"pruner must be a folder, a Hub id or one of {', '.join(get_args(Rule))}; got "
                f"{self.pruner!r}"
            )
        if self.layer is not None and as_int(self.layer) is None:
            raise TypeError(f"layer must be the number of an encoder layer; got {self.layer!r}")
        if self.layer is not None and self.rule is not None:
            raise ValueError(f"layer is for official weights; {self.pruner!r} needs none: leave it out")
        if self.newlines not in ("last", "all"):
            raise ValueError(
                f'newlines must be "last" or "all"; got {self.newlines!r} (how many "rows" has depends on '
                "what is chosen, and vLLM counts tokens before it has seen the image)"
            )
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {self.backend!r}")
        if self.merge == "features":
            raise ValueError(f'merge="features" is not available: {_TOWER}, and the projector too')
        Options(self.rule or DEFAULT_RULE, **{**self._options(), "fill": "auto", "features": "auto"})

    @property
    def rule(self) -> Rule | None:
        """Who chooses without training; ``None`` if it is a pruner."""
        return next((rule for rule in get_args(Rule) if rule == self.pruner), None)

    def _options(self) -> dict[str, Any]:
        same = (
            "keep",
            "seed",
            "backend",
            "precision",
            "refine",
            "newlines",
            "features",
            "fill",
            "on_invalid",
        )  # fmt: skip
        merge = "projected" if self.merge == "auto" else self.merge
        return {name: getattr(self, name) for name in same} | {
            "merge": merge,
            "weigh": False,
            "capture": False,
        }

    def options(self, pruner: OCPruner | None) -> Options:
        """The same, as :func:`ocvtp.apply` has it.

        Args:
            pruner: of :meth:`load_pruner`, unless a rule chooses.
        """
        chooser = self.rule or pruner
        assert chooser is not None
        return Options(chooser, **self._options())

    def load_pruner(self) -> OCPruner:
        """The pruner as it is now, on the CPU.

        Raises:
            OSError, ValueError: no such pruner, or a damaged one.
        """
        return read_pruner(self.pruner, self.layer)


def spec_of(hf_config: Any) -> Spec:
    """Settings of the model that ``hf_config`` describes.

    Raises:
        TypeError, ValueError: see :meth:`Spec.from_dict`.
    """
    return Spec.from_dict(getattr(hf_config, KEY, None))
