"""Methods of others between vision encoder and language model, each as one argument of ``ocvtp.apply``.

A name takes a method as its authors set it; an instance takes other settings:

    ocvtp.apply(model, "visionzip", keep=64)
    ocvtp.apply(model, ocvtp.vlm.rivals.HiPrune(alpha=0.2), keep=64)

Each equals tensors that its official implementation produced, where it is as published; what is our
adaptation is called so by the report and in ``docs/methods.md``.
"""

from __future__ import annotations

from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.rivals.by_attention import FasterVLM, HiPrune, VisPruner
from ocvtp.vlm.rivals.by_distance import DivPrune
from ocvtp.vlm.rivals.by_merging import PruMerge, PruMergePlus, ToMe, VisionZip
from ocvtp.vlm.rivals.by_text import CDPruner, Trim
from ocvtp.vlm.rivals.text import ClipText

__all__ = [
    "CDPruner",
    "ClipText",
    "DivPrune",
    "FasterVLM",
    "HiPrune",
    "PruMerge",
    "PruMergePlus",
    "Reducer",
    "ToMe",
    "Trim",
    "VisPruner",
    "VisionZip",
]
