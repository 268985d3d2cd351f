"""Whether a method can work on a model."""

from __future__ import annotations

from typing import Any

from ocvtp.methods.in_llm.averages import check_depth
from ocvtp.methods.in_llm.contract import Method, Numbering
from ocvtp.vlm.in_llm.decoder import Decoder


def fit(model: Any, method: Method) -> tuple[Decoder, Numbering]:
    """The language model, and how positions behind a cut are numbered there.

    Raises:
        ValueError: a method that can't work on this model.
    """
    decoder = Decoder(model)
    check_depth(method, decoder.depth)
    method.check(decoder.heads)
    if method.cuts[0] < decoder.stacked:
        raise ValueError(
            f"{method.name} would cut before layer {method.cuts[0]}, and up to layer {decoder.stacked - 1} "
            "this model adds features of its encoder to every image token (DeepStack): cut before layer "
            f"{decoder.stacked} or later"
        )
    if method.numbering == "renumbered" and decoder.mrope:
        raise ValueError(
            "positions in three dimensions can't be renumbered: use numbering=None, which leaves them as "
            "they are"
        )
    if method.numbering is not None:
        return decoder, method.numbering
    return decoder, "kept" if decoder.mrope else method.published_numbering
