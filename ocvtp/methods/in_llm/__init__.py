"""Methods that drop vision tokens between the layers of a language model: rivals, restated from their papers.

Settings are frozen dataclasses, which :func:`ocvtp.apply` takes as ``inside``; what they do is pure functions
of tensors. None of it knows a model.
"""

from __future__ import annotations

from ocvtp.methods.in_llm.averages import Averages, averages
from ocvtp.methods.in_llm.by_name import Inside, by_name
from ocvtp.methods.in_llm.contract import Choice, Method, Numbering, Rows
from ocvtp.methods.in_llm.dart import Dart, least_alike, longest
from ocvtp.methods.in_llm.density import density_peaks
from ocvtp.methods.in_llm.fastv import FastV, fastv_scores
from ocvtp.methods.in_llm.gravity import gravity
from ocvtp.methods.in_llm.presets import PRESETS, REFERENCES, Preset, preset
from ocvtp.methods.in_llm.pyramid_drop import PyramidDrop
from ocvtp.methods.in_llm.ranking import highest
from ocvtp.methods.in_llm.sparsevlm import SparseVLM, recycled, sparsevlm_scores, text_raters

__all__ = [
    "PRESETS",
    "REFERENCES",
    "Averages",
    "Choice",
    "Dart",
    "FastV",
    "Inside",
    "Method",
    "Numbering",
    "Preset",
    "PyramidDrop",
    "Rows",
    "SparseVLM",
    "averages",
    "by_name",
    "density_peaks",
    "fastv_scores",
    "gravity",
    "highest",
    "least_alike",
    "longest",
    "preset",
    "recycled",
    "sparsevlm_scores",
    "text_raters",
]
