"""LLaVA-1.5."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from vllm.model_executor.models import llava

from ocvtp.serving.vllm.counts import PictureCounts
from ocvtp.serving.vllm.model import Pruned, twin
from ocvtp.serving.vllm.visions import Pictures
from ocvtp.vlm.contracts.adapter import Vision


class PrunedLlava(Pruned):
    """LLaVA-1.5."""

    counts_class = PictureCounts
    vision_tower: Any

    def parts(self, image_input: Any) -> Iterator[dict[str, Any]]:
        """See :class:`Pruned`."""
        size = max(1, self._most // self.plan.layout.patches({}))
        for chunk in image_input["pixel_values"].split(size):
            yield {"type": "pixel_values", "pixel_values": chunk}

    def vision(self, part: Any, encode: Callable[[], Any]) -> Vision:
        """See :class:`Pruned`."""
        body, layout, pixels = self.vision_tower.vision_model, self.plan.layout, part["pixel_values"]
        tower = self.encoder(body, body.encoder.layers)
        segments = layout.segments(len(pixels), {})
        prefix, class_rows = layout.prefix({})
        totals = [layout.patches({}) + class_rows] * len(pixels)
        common = (tower, encode, segments, totals, pixels.device)
        return Pictures(*common, prefix=prefix, class_rows=class_rows)


Model = twin(
    PrunedLlava,
    llava.LlavaForConditionalGeneration,
    llava.LlavaProcessingInfo,
    llava.LlavaMultiModalProcessor,
    llava.LlavaDummyInputsBuilder,
)
