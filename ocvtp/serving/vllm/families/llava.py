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

    def parts(self, image_input: Any) -> Iterator[dict[str, Any]]:
        """See :class:`Pruned`."""
        size = max(1, self._most // self.plan.layout.patches({}))
        for chunk in image_input["pixel_values"].split(size):
            yield {"type": "pixel_values", "pixel_values": chunk}

    def vision(self, part: Any, encode: Callable[[], Any]) -> Vision:
        """See :class:`Pruned`."""
        layout, pixels = self.plan.layout, part["pixel_values"]
        segments = layout.segments(len(pixels), {})
        prefix, class_rows = layout.prefix({})
        totals = [layout.patches({}) + class_rows] * len(pixels)
        common = (self.usual_tower(), encode, segments, totals, pixels.device)
        return Pictures(*common, prefix=prefix, class_rows=class_rows)


Model = twin(
    PrunedLlava,
    llava.LlavaForConditionalGeneration,
    llava.LlavaProcessingInfo,
    llava.LlavaMultiModalProcessor,
    llava.LlavaDummyInputsBuilder,
)
