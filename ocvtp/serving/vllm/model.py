"""What all families share: vLLM's own model, pruning image rows on their way to the language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.multimodal import MULTIMODAL_REGISTRY

from ocvtp.serving.vllm.counts import Counts
from ocvtp.serving.vllm.errors import REFUSALS, ServingError
from ocvtp.serving.vllm.front import DIGEST, PrunedInfo, PrunedProcessor
from ocvtp.serving.vllm.plan import Plan, plan_for
from ocvtp.serving.vllm.ranks import OnAllRanks
from ocvtp.serving.vllm.spec import spec_of
from ocvtp.serving.vllm.taps import Tower
from ocvtp.vlm.contracts.adapter import Vision
from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.contracts.rows import KeptRows
from ocvtp.vlm.encode.encode import prune_rows
from ocvtp.vlm.encode.selectors import PrunerSelector


class Pruned:
    """Mixin before an in-tree ``...ForConditionalGeneration``."""

    counts_class: type[Counts]
    #: Methods of vLLM's model that have to be there for ours to be called.
    overrides: tuple[str, ...] = ("_process_image_input",)
    # vLLM then splits the tower's weights instead of the images, and says so.
    supports_encoder_tp_data = False
    # Adapters of the tower would be told the number of kept tokens as that of the tower's.
    supports_tower_connector_lora = False

    config: Any
    vision_tower: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        for flag in ("compile_mm_encoder", "cudagraph_mm_encoder"):
            if getattr(vllm_config.compilation_config, flag, False):
                raise ServingError(f"ocvtp: the vision tower is read layer by layer, so {flag} must be off")
        device = torch.device(vllm_config.device_config.device)
        try:
            plan = plan_for(config, spec_of(config), vllm_config.model_config.model, device)
        except REFUSALS as error:  # this machine may lack what the front end's has
            raise ServingError(f"ocvtp: {error}") from error
        if getattr(config, DIGEST, None) not in (None, plan.digest):
            raise ServingError(
                "ocvtp: this machine has another pruner, or another ocvtp, than the front end: install the "
                "same version on every node, and give each the same pruner"
            )
        selector = plan.settings.selector
        assert not isinstance(selector, Reducer)  # rival methods have no setting here
        if isinstance(selector, PrunerSelector):
            # A plain object holds it: as a submodule, vLLM would look for its weights in the checkpoint.
            selector.pruner.to(device)
        self._reads_scores = selector.reads_scores
        settings = replace(plan.settings, selector=OnAllRanks(selector))
        self.plan: Plan = replace(plan, settings=settings)
        #: Tokens of images that go through the tower at once; vLLM counts kept ones, of which more would fit.
        self._most = vllm_config.scheduler_config.max_num_batched_tokens
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]

    def _process_image_input(self, image_input: Any) -> Any:
        return self.pruned(image_input, super()._process_image_input)  # type: ignore[misc]

    def pruned(self, image_input: Any, encode: Callable[[Any], Any]) -> Any:
        """Rows of each image for the language model.

        Args:
            image_input: as vLLM has validated it.
            encode: vLLM's own encoder.
        """
        if image_input["type"] == "image_embeds":
            return self.whole(encode(image_input), image_input)
        rows: list[torch.Tensor] = []
        for fields in self.parts(image_input):
            part = type(image_input)(validate=False, **fields)  # vLLM tells kinds of input by their class
            vision = self.vision(part, lambda: encode(part))  # noqa: B023
            rows += self.handed_over(prune_rows(vision, self.plan.settings), part)
        return rows

    def scored(self, layer: int) -> int | None:
        """``layer``, if somebody asks for its attention."""
        return layer if self._reads_scores else None

    def encoder(self, body: Any, layers: Sequence[Any], tail: str = "post_layernorm") -> Tower:
        """A tower of layers whose last one is consumed."""
        return Tower(layers, getattr(body, tail, None), self.scored(len(layers) - 1))

    def usual_tower(self) -> Tower:
        """That of vLLM's CLIP and SigLIP models."""
        body = self.vision_tower.vision_model
        return self.encoder(body, body.encoder.layers)

    # What a family says.

    def parts(self, image_input: Any) -> Iterator[dict[str, Any]]:
        """Fields of batches no larger in the tower than vLLM would make them without pruning."""
        raise NotImplementedError

    def vision(self, part: Any, encode: Callable[[], Any]) -> Vision:
        """One batch."""
        raise NotImplementedError

    def handed_over(self, kept: KeptRows, part: Any) -> list[torch.Tensor]:
        """Kept rows as vLLM's runner wants them."""
        return list(kept.rows)

    def whole(self, rows: Any, image_input: Any) -> Any:
        """Rows that the caller made, which are not pruned."""
        return rows


def batches(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """First and last-but-one of as many neighbours as sum to ``most``; at least one each time."""
    start = 0
    while start < len(sizes):
        stop = start + 1
        while stop < len(sizes) and sum(sizes[start : stop + 1]) <= most:
            stop += 1
        yield start, stop
        start = stop


def twin(ours: type[Pruned], theirs: Any, info: Any, processor: Any, dummy: Any) -> Any:
    """vLLM's model, info and processor with ours in front.

    Raises:
        ImportError: this vLLM does not call what ours override, which would go unnoticed otherwise.
    """
    for theirs_class, ours_class in ((processor, PrunedProcessor), (info, PrunedInfo), (theirs, ours)):
        for name in ours_class.overrides:
            if not hasattr(theirs_class, name):
                raise ImportError(
                    f"ocvtp can't prune {theirs.__name__} in this vLLM: its {theirs_class.__name__} has no "
                    f"{name}. docs/serving.md says which versions it serves"
                )
    info = type(f"Pruned{info.__name__}", (PrunedInfo, info), {"counts_class": ours.counts_class})
    processor = type(f"Pruned{processor.__name__}", (PrunedProcessor, processor), {})
    # With the name of vLLM's class, by which vLLM's speculative decoding tells models apart.
    model = type(theirs.__name__, (ours, theirs), {"__module__": ours.__module__})
    return MULTIMODAL_REGISTRY.register_processor(processor, info=info, dummy_inputs=dummy)(model)
