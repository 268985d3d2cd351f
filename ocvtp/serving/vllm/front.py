"""vLLM's front end: how many placeholders an image gets, and what its caches are keyed by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.multimodal.processing import PromptInsertion, PromptUpdate, PromptUpdateDetails

from ocvtp.serving.vllm.counts import Counts, Run
from ocvtp.serving.vllm.errors import REFUSALS, ServingError
from ocvtp.serving.vllm.plan import plan_for
from ocvtp.serving.vllm.spec import spec_of
from ocvtp.serving.vllm.twins import architecture_of

#: Where the digest travels in the model's configuration, for workers to compare theirs with.
DIGEST = "ocvtp_digest"


class PrunedInfo:
    """Mixin before an in-tree ``...ProcessingInfo``."""

    overrides = ("get_supported_mm_limits", "get_mm_max_tokens_per_item")
    counts_class: type[Counts]

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)  # type: ignore[call-arg]
        config = ctx.model_config.hf_config
        try:
            _check_family(ctx.model_config)
            spec = spec_of(config)
            plan = plan_for(config, spec, ctx.model_config.model)
            self.counts = self.counts_class(plan)
            self.counts.check()
            if (ctx.model_config.multimodal_config.video_pruning_rate or 0) > 1e-9:
                raise ValueError("only images are served, so --video-pruning-rate has no meaning")
        except REFUSALS as error:
            raise ServingError(f"ocvtp: {error}") from error
        self.digest = plan.digest
        setattr(config, DIGEST, self.digest)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Images only: a video is refused rather than served unpruned."""
        found = super().get_supported_mm_limits()  # type: ignore[misc]
        return {modality: limit if modality == "image" else 0 for modality, limit in found.items()}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int] | None:
        """By the family; see :meth:`~ocvtp.serving.vllm.counts.Counts.most`."""
        counts = {**mm_counts, "video": 0}
        full = super().get_mm_max_tokens_per_item(seq_len, counts)  # type: ignore[misc]
        most = self.counts.most(None if full is None else full["image"], self)
        return None if most is None else {"image": most}


def _check_family(model_config: Any) -> None:
    """Raise ``ValueError`` for the twin of another family than the model's."""
    config = model_config.hf_config
    right = architecture_of(config, model_config.model)
    if right not in (config.architectures or ()):
        raise ValueError(
            f"{', '.join(config.architectures or ())} can't serve {model_config.model}, a model of type "
            f'{config.model_type!r}: give --hf-overrides "architectures": ["{right}"]'
        )


class PrunedProcessor:
    """Mixin before an in-tree ``...MultiModalProcessor``."""

    overrides = ("_get_prompt_updates", "_get_mm_hashes")
    info: Any

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        return [self._shortened(update, out_mm_kwargs) for update in updates if update.modality == "image"]

    def _shortened(self, update: Any, items: Any) -> Any:
        """The same update with placeholders of kept rows only, whichever way vLLM spells them."""

        def of(number: int) -> Any:
            full = update.content(number) if callable(update.content) else update.content
            item = items["image"][number]
            if "image_embeds" in item:  # rows that the caller made
                return full
            whole = full if isinstance(full, PromptUpdateDetails) else PromptUpdateDetails.from_seq(full)
            ids = torch.tensor(whole.full)
            embeds = torch.ones_like(ids, dtype=torch.bool)
            if whole.is_embed is not None:
                embeds = whole.is_embed(whole.full)
            runs = self.info.counts.runs(int(embeds.sum()), item)
            return PromptUpdateDetails(ids[staying(embeds, runs)].tolist(), whole.is_embed)

        if isinstance(update, PromptInsertion):
            return replace(update, insertion=of)
        return replace(update, replacement=of)

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """Processor, encoder and prefix caches, and whatever connector shares them, are keyed by these."""
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        return {kind: [f"{one}-{self.info.digest}" for one in found] for kind, found in hashes.items()}


def staying(embeds: torch.Tensor, runs: Sequence[Run]) -> torch.Tensor:
    """Which tokens of a replacement stay: of each run of placeholders the first few, and all that are none.

    Args:
        embeds: ``[n]`` bool, which are placeholders.
        runs: of placeholders, ``(full, kept)`` each, all of them together.
    """
    of_rows = torch.cat([torch.arange(full) < kept for full, kept in runs])
    stay = ~embeds
    stay[embeds] = of_rows
    return stay
