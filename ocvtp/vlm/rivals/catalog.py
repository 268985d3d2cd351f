"""All methods by name, and where each works."""

from __future__ import annotations

from dataclasses import replace

from ocvtp.vlm.contracts.reducer import Reducer, Site
from ocvtp.vlm.rivals.by_attention import FasterVLM, HiPrune, VisPruner
from ocvtp.vlm.rivals.by_distance import DivPrune
from ocvtp.vlm.rivals.by_merging import PruMerge, PruMergePlus, ToMe, VisionZip
from ocvtp.vlm.rivals.by_text import CDPruner, Trim

METHODS: dict[str, type[Reducer]] = {
    kind.name: kind
    for kind in (
        CDPruner,
        DivPrune,
        FasterVLM,
        HiPrune,
        PruMerge,
        PruMergePlus,
        ToMe,
        Trim,
        VisionZip,
        VisPruner,
    )
}


def rival(name: str) -> Reducer:
    """The method of a name, as its authors set it."""
    return METHODS[name]()


def bound(method: Reducer, site: Site) -> Reducer:
    """A method made up for a model.

    Raises:
        ValueError: it can't work there; the message lists what can, or says what is missing.
    """
    family = site.family
    if family not in method.families:
        there = ", ".join(sorted(name for name, kind in METHODS.items() if family in kind.families))
        where = ", ".join(sorted(method.families))
        raise ValueError(
            f"{method.title} has no proven form on {family}; it works on {where}. "
            f"On {family}: {there or 'none of the rival methods'}"
        )
    behind = family == "qwen2_5_vl"
    if not site.class_token and not behind and method.classless is None:
        raise ValueError(f"{method.title} needs a tower with a class token, which this model's has not")
    if not behind and (len(site.consumed) > 1 or site.extra_rows):
        raise ValueError(
            f"{method.title} is defined for one vision_feature_layer and "
            'vision_feature_select_strategy="default", which this model has not'
        )
    if method.reads_places and not site.square:
        raise ValueError(
            f"{method.title} needs tokens that are rows and columns of a picture, which this model's "
            f"{site.tokens} are not"
        )
    note = method.note(family, class_token=site.class_token)
    return replace(method, adaptation=note, behind=behind).bound(site)
