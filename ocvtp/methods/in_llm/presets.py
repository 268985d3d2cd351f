"""Settings for the budgets that papers compare at: as published, and so that all compute as much.

``counted`` says of each what its budget means, see :mod:`ocvtp.methods.in_llm.averages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ocvtp.methods.in_llm.contract import Method
from ocvtp.methods.in_llm.dart import Dart
from ocvtp.methods.in_llm.fastv import FastV
from ocvtp.methods.in_llm.pyramid_drop import PyramidDrop
from ocvtp.methods.in_llm.sparsevlm import SparseVLM

Counted = Literal["nominal", "entering", "leaving"]
_PAPER, _AUTHOR, _CODE = "the paper", "its author, in its issues", "its code"
_OURS = "ours: fitted, not published"


@dataclass(frozen=True)
class Preset:
    """One setting.

    Attributes:
        method: the settings.
        counted: what the budget is of: tokens behind the cut, or the average that goes into layers, or comes
            out of them.
        source: who says so.
    """

    method: Method
    counted: Counted
    source: str


@dataclass(frozen=True)
class Reference:
    """The model and prompt that presets were made for.

    Attributes:
        depth: layers of the language model.
        tokens: vision tokens of the prompt; ``None`` where budgets are shares.
    """

    depth: int
    tokens: int | None


REFERENCES: dict[str, Reference] = {
    "llava-1.5-7b": Reference(32, 576),
    "llava-next-7b": Reference(32, 2880),
    "qwen2.5-vl-7b": Reference(28, None),
    "qwen2.5-vl-3b": Reference(36, None),
}


def _pyramid(layers: tuple[int, int, int], ratio: float) -> PyramidDrop:
    return PyramidDrop(layers, (ratio, ratio**2, ratio**3))


def _sparse(version: Literal[1, 2], keep: tuple[int | float, ...], *layers: int) -> SparseVLM:
    return SparseVLM(layers or (2, 6, 15), keep, version)


_LLAVA: dict[str, dict[int | float, tuple[Preset, ...]]] = {
    "fastv": {
        192: (Preset(FastV(2, 166), "entering", _OURS),),
        128: (Preset(FastV(2, 98), "entering", _OURS),),
        64: (Preset(FastV(2, 30), "entering", _OURS),),
    },
    "sparsevlm": {
        192: (
            Preset(_sparse(1, (271, 180, 99)), "entering", _OURS),
            Preset(_sparse(1, (300, 200, 110)), "leaving", _CODE),
        ),
        128: (
            Preset(_sparse(1, (241, 88, 29)), "entering", _OURS),
            Preset(_sparse(1, (303, 110, 36)), "leaving", _CODE),
        ),
        64: (
            Preset(_sparse(1, (19, 8, 5)), "entering", _OURS),
            Preset(_sparse(1, (66, 30, 17)), "leaving", _CODE),
        ),
    },
    "sparsevlm2": {
        192: (
            Preset(_sparse(2, (271, 181, 107)), "entering", _OURS),
            Preset(_sparse(2, (300, 200, 118)), "leaving", _CODE),
        ),
        128: (
            Preset(_sparse(2, (196, 89, 49)), "entering", _OURS),
            Preset(_sparse(2, (238, 108, 60)), "leaving", _CODE),
        ),
        64: (
            Preset(_sparse(2, (24, 12, 7)), "entering", _OURS),
            Preset(_sparse(2, (66, 34, 20)), "leaving", _CODE),
        ),
    },
    "pyramiddrop": {
        192: (Preset(_pyramid((2, 8, 16), 0.56), "entering", _OURS),),
        128: (Preset(_pyramid((2, 8, 16), 0.42), "entering", _OURS),),
        64: (Preset(_pyramid((2, 8, 16), 0.19), "entering", _AUTHOR),),
    },
    "dart": {
        192: (Preset(Dart(2, 166), "entering", _OURS), Preset(Dart(2, 192), "nominal", _OURS)),
        128: (Preset(Dart(2, 98), "entering", _OURS), Preset(Dart(2, 132), "nominal", _CODE)),
        64: (Preset(Dart(2, 30), "entering", _OURS), Preset(Dart(2, 64), "nominal", _OURS)),
    },
}
#: 160 of 2880 is below what two whole layers cost.
_NEXT: dict[str, dict[int | float, tuple[Preset, ...]]] = {
    "fastv": {
        640: (Preset(FastV(2, 491), "entering", _OURS),),
        320: (Preset(FastV(2, 149), "entering", _OURS),),
    },
    "sparsevlm": {
        640: (
            Preset(_sparse(1, (1226, 445, 146)), "entering", _OURS),
            Preset(_sparse(1, (1515, 550, 180)), "leaving", "ours: the list of 128 of 576 times 5"),
        ),
        320: (
            Preset(_sparse(1, (99, 45, 25)), "entering", _OURS),
            Preset(_sparse(1, (330, 150, 85)), "leaving", "ours: the list of 64 of 576 times 5"),
        ),
    },
    "sparsevlm2": {
        640: (
            Preset(_sparse(2, (977, 444, 246)), "entering", _OURS),
            Preset(_sparse(2, (1190, 540, 300)), "leaving", "ours: the list of 128 of 576 times 5"),
        ),
        320: (
            Preset(_sparse(2, (118, 61, 36)), "entering", _OURS),
            Preset(_sparse(2, (330, 170, 100)), "leaving", "ours: the list of 64 of 576 times 5"),
        ),
    },
    "pyramiddrop": {
        640: (Preset(_pyramid((2, 8, 16), 0.42), "entering", _OURS),),
        320: (Preset(_pyramid((2, 8, 16), 0.192), "entering", _OURS),),
    },
    "dart": {
        640: (Preset(Dart(2, 491), "entering", _OURS), Preset(Dart(2, 640), "nominal", _OURS)),
        320: (Preset(Dart(2, 149), "entering", _OURS), Preset(Dart(2, 324), "nominal", _CODE)),
        160: (Preset(Dart(2, 160), "nominal", _OURS),),
    },
}


def _qwen(
    single: tuple[float, float, float],
    pyramid: tuple[float, float, float],
    before: tuple[int, int, int],
    after: tuple[int, int, int],
    fitted: tuple[tuple[float, float, float] | None, ...],
) -> dict[str, dict[int | float, tuple[Preset, ...]]]:
    budgets = (0.333, 0.222, 0.111)
    lists = ((0.521, 0.347, 0.191), (0.526, 0.191, 0.0625), (0.115, 0.052, 0.03))
    return {
        "fastv": {
            budget: (Preset(FastV(2, keep), "entering", _OURS),)
            for budget, keep in zip(budgets, single, strict=True)
        },
        "sparsevlm": {
            budget: (
                *((Preset(_sparse(1, fit, *after), "entering", _OURS),) if fit else ()),
                Preset(_sparse(1, keep, *after), "leaving", "ours: shares of 576 of the published lists"),
            )
            for budget, keep, fit in zip(budgets, lists, fitted, strict=True)
        },
        "pyramiddrop": {
            budget: (Preset(_pyramid(before, ratio), "entering", _OURS),)
            for budget, ratio in zip(budgets, pyramid, strict=True)
        },
        "dart": {
            budget: (Preset(Dart(2, keep), "entering", _OURS), Preset(Dart(2, budget), "nominal", _CODE))
            for budget, keep in zip(budgets, single, strict=True)
        },
    }


#: Model -> method -> budget -> settings, what counts what goes in before the others.
PRESETS: dict[str, dict[str, dict[int | float, tuple[Preset, ...]]]] = {
    "llava-1.5-7b": _LLAVA,
    "llava-next-7b": _NEXT,
    "qwen2.5-vl-7b": _qwen(
        (0.282, 0.162, 0.043),
        (0.555, 0.411, 0.168),
        (2, 7, 14),
        (2, 5, 13),
        ((0.4566, 0.3038, 0.1667), (0.401, 0.1458, 0.0469), None),
    ),
    "qwen2.5-vl-3b": _qwen(
        (0.294, 0.176, 0.059),
        (0.563, 0.425, 0.207),
        (2, 9, 18),
        (2, 7, 17),
        ((0.4774, 0.3194, 0.1753), (0.4375, 0.158, 0.0521), (0.0556, 0.0243, 0.0139)),
    ),
}


def preset(model: str, method: str, budget: int | float, counted: Counted | None = None) -> Preset:
    """Settings of ``method`` for ``budget`` vision tokens (a share of them for Qwen) on ``model``.

    Args:
        model: a key of :data:`PRESETS`.
        method: one of its methods.
        budget: one of its budgets.
        counted: what the budget is of; ``None``: what goes in, where there is such a setting.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    found = PRESETS.get(model)
    if found is None:
        raise ValueError(f"no presets for {model!r}; there are some for {', '.join(PRESETS)}")
    if method not in found:
        raise ValueError(f"no presets of {method!r}; there are those of {', '.join(found)}")
    if budget not in found[method]:
        known = ", ".join(str(one) for one in found[method])
        raise ValueError(f"no preset of {method} for {budget} on {model}; there are {known}")
    for one in found[method][budget]:
        if counted in (None, one.counted):
            return one
    known = ", ".join(one.counted for one in found[method][budget])
    raise ValueError(f"{method} for {budget} on {model} is counted as {known}, not as {counted!r}")
