"""InternVL in transformers' format."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import interns1

from ocvtp.serving.vllm.counts import SquareCounts
from ocvtp.serving.vllm.families.squared import PrunedSquares
from ocvtp.serving.vllm.model import twin
from ocvtp.serving.vllm.taps import Tower


class InternVLCounts(SquareCounts):
    """vLLM overlooks what the configuration may say of layers, and that tiles are cut by default."""

    def check(self) -> None:
        """See :class:`~ocvtp.serving.vllm.counts.Counts`."""
        if self.plan.layout.layer({}) != -1:
            raise ValueError(
                "vLLM reads InternVL's last layer, and this model's vision_feature_layer is "
                f"{self.plan.layout.layer({})}"
            )

    def most(self, full: int | None, info: Any) -> int:
        """See :class:`~ocvtp.serving.vllm.counts.Counts`."""
        tiles = int(info.get_hf_processor().image_processor.max_patches) + 1
        return tiles * self.plan.keep(self.plan.layout.tokens)


class PrunedInternVL(PrunedSquares):
    """InternVL."""

    counts_class = InternVLCounts
    overrides = ("_process_vision_input",)
    vision_tower: Any

    def _process_vision_input(self, image_input: Any) -> Any:  # vLLM's name here
        return self.pruned(image_input, super()._process_vision_input)  # type: ignore[misc]

    def tower(self) -> Tower:
        """See :class:`PrunedSquares`."""
        return self.encoder(self.vision_tower, self.vision_tower.encoder.layer, "layernorm")


Model = twin(
    PrunedInternVL,
    interns1.InternS1ForConditionalGeneration,
    interns1.InternS1ProcessingInfo,
    interns1.InternS1MultiModalProcessor,
    interns1.InternS1DummyInputsBuilder,
)
