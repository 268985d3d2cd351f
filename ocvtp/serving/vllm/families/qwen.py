"""Qwen-VL: what the three generations share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm.model_executor.models.interfaces import SupportsMultiModalPruning

from ocvtp.serving.vllm.counts import UnitCounts
from ocvtp.serving.vllm.cpu_runner import mend_cpu_runner
from ocvtp.serving.vllm.model import Pruned, batches
from ocvtp.serving.vllm.positions import Positions
from ocvtp.serving.vllm.taps import Tower
from ocvtp.serving.vllm.visions import Units
from ocvtp.vlm.contracts.adapter import Vision
from ocvtp.vlm.layouts.qwen_geometry import as_grids, geometry
from ocvtp.vlm.layouts.units import window_units

if not hasattr(SupportsMultiModalPruning, "recompute_mrope_positions"):
    raise ImportError(
        "ocvtp can't prune Qwen-VL in this vLLM, which asks nobody for positions of pruned images. "
        "docs/serving.md says which versions it serves"
    )
mend_cpu_runner()  # the runner asks for this model's class before it loads the model


class PrunedQwen(Positions, Pruned):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

    counts_class = UnitCounts
    overrides = ("_process_image_input", "get_mrope_input_positions")
    visual: Any

    def parts(self, image_input: Any) -> Iterator[dict[str, Any]]:
        """See :class:`Pruned`."""
        grids = image_input["image_grid_thw"]
        lengths = grids.prod(-1).tolist()
        pixels = image_input["pixel_values"].split(lengths)
        for start, stop in batches(lengths, self._most * self.plan.layout.unit**2):
            yield {
                "type": "pixel_values",
                "pixel_values": torch.cat(pixels[start:stop]),
                "image_grid_thw": grids[start:stop],
            }

    def vision(self, part: Any, encode: Callable[[], Any]) -> Vision:
        """See :class:`Pruned`."""
        layout, device = self.plan.layout, part["pixel_values"].device
        grids = as_grids(part["image_grid_thw"], layout.unit)
        plan = geometry(grids, layout.unit, window_units(layout.vision), device.type == "cuda")
        cut = layout.cut(grids, "each")
        merger = self.visual.merger
        tail = merger.ln_q if hasattr(merger, "ln_q") else merger.norm
        tower = Tower(self.visual.blocks, tail, self.scored(layout.scored))
        common = (tower, encode, cut.segments, cut.totals, device)
        width = int(self.config.get_text_config().hidden_size)
        return Units(*common, merge=layout.unit, plan=plan, width=width)
