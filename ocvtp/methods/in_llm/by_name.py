"""Methods by name, fitted to a budget."""

from __future__ import annotations

from typing import Literal, get_args

from ocvtp.methods.in_llm.contract import Method
from ocvtp.methods.in_llm.dart import Dart
from ocvtp.methods.in_llm.fastv import FastV
from ocvtp.methods.in_llm.pyramid_drop import PyramidDrop
from ocvtp.methods.in_llm.sparsevlm import SparseVLM

Inside = Literal["dart", "fastv", "pyramiddrop", "sparsevlm", "sparsevlm2"]
_POOL = "tokens of all tiles are one pool"
#: What is ours on a model type, beside what a method says of models with positions in three dimensions.
ADAPTATIONS: dict[str, dict[Inside, str]] = {
    "llava_next": {"fastv": _POOL, "sparsevlm": _POOL, "sparsevlm2": _POOL},
    "qwen2_5_vl": {"fastv": "it was published for positions in one dimension"},
}
#: Layers that published settings were made for.
_DEPTH = 32
_SHALLOWEST = 12


def by_name(name: Inside, average: int | float, *, depth: int, tokens: int | None = None) -> Method:
    """The method of a name, cutting where its authors do, so that layers get ``average`` vision tokens.

    Of other depths than the 32 layers that settings were published for, the second and third cut are as far
    up; the first, two layers in, stays.

    Args:
        name: one of :data:`Inside`.
        average: tokens, or a share of them, by what goes into each layer.
        depth: layers of the language model.
        tokens: vision tokens of a prompt; may be left out for a share.

    Raises:
        TypeError, ValueError: another name, a language model too shallow for these cuts, or an average that
            can't be had; the message has the range.
    """
    if name not in get_args(Inside):
        raise ValueError(f"name must be one of {', '.join(get_args(Inside))}; got {name!r}")
    if depth < _SHALLOWEST:
        raise ValueError(
            f"{name} was published for {_DEPTH} layers, and this language model has {depth}: say where to "
            "cut, with settings of ocvtp.methods.in_llm as inside="
        )
    if name == "fastv":
        return FastV.fit(average, depth=depth, tokens=tokens)
    if name == "dart":
        return Dart.fit(average, depth=depth, tokens=tokens)
    if name == "pyramiddrop":
        layers = (2, depth // 4, depth // 2)
        return PyramidDrop.fit(average, depth=depth, tokens=tokens, layers=layers)
    after = (2, round(depth * 6 / _DEPTH), round(depth * 15 / _DEPTH))
    version: Literal[1, 2] = 2 if name == "sparsevlm2" else 1
    return SparseVLM.fit(average, depth=depth, tokens=tokens, layers=after, version=version)
