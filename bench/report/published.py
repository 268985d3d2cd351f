"""Figures that the method's authors print, to stand beside ours: facts, with their source.

arXiv 2511.20439: latency and FLOPs of LLaVA-NeXT are in its text, the device is in the caption of Figure 3.
"""

from __future__ import annotations

from typing import NamedTuple


class Time(NamedTuple):
    """Milliseconds of inference on one image."""

    device: str
    model: str
    method: str
    tokens: int
    ms: float


FIGURE_3 = (
    Time("V100-32G (paper)", "LLaVA-NeXT-7B", "unpruned", 2880, 811.8),
    Time("V100-32G (paper)", "LLaVA-NeXT-7B", "OC-VTP", 160, 287.3),
)
#: Model -> tokens -> TFLOP, by the paper's accounting.
FIGURE_1 = {"llava-next-7b": {2880: 33.76, 160: 1.95}}
