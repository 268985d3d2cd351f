"""A call behind a prompt that tokens were dropped of: every layer is told what its own cache holds."""

from __future__ import annotations

from typing import Any

import torch

from ocvtp.vlm.in_llm.decoder import Decoder
from ocvtp.vlm.in_llm.masks import MaskMaker, positions_behind
from ocvtp.vlm.in_llm.stages import Stage, Trace


class Later:
    """State of the call.

    Args:
        decoder: the language model.
        masks: its masks' maker.
        cache: that the call goes on with.
        trace: what lies on it, for the rows of this call.
        past: columns that the first layers hold.
        live: ``[B, past + S]`` bool; ``None``: no padding.
    """

    def __init__(
        self,
        decoder: Decoder,
        masks: MaskMaker,
        cache: Any,
        trace: Trace,
        past: int,
        live: torch.Tensor | None,
    ) -> None:
        self._decoder, self._masks, self.cache = decoder, masks, cache
        self.trace, self._past, self._live = trace, past, live
        self._made: dict[int, dict[str, Any]] = {}  # by cut

    def layer(
        self, number: int, hidden: torch.Tensor, arguments: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """See :meth:`ocvtp.vlm.in_llm.prefill.Prefill.layer`."""
        stage = next((one for one in reversed(self.trace.stages) if one.cut <= number), None)
        if stage is None:
            return hidden, arguments
        if stage.cut not in self._made:
            self._made[stage.cut] = self._of(stage, hidden, arguments)
        return hidden, {**arguments, **self._made[stage.cut]}

    def end(self, hidden: torch.Tensor) -> torch.Tensor:
        """Nothing goes."""
        return hidden

    def _of(self, stage: Stage, hidden: torch.Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        batch, queries = hidden.shape[:2]
        live = None
        # Without padding, transformers mostly has no mask for the first layers: it looked, and needn't again.
        if self._live is not None and not (stage.full and arguments.get("attention_mask") is None):
            since = self._live[:, self.trace.prompt :].to(hidden.device)
            live = torch.cat([stage.live.to(hidden.device), since], dim=1)
        elif not stage.full:
            held = stage.live.to(hidden.device)
            since = held.new_ones(batch, self._past + queries - self.trace.prompt)
            live = torch.cat([held, since], dim=1)
        made: dict[str, Any] = {"attention_mask": self._masks(self.cache, stage.cut, hidden, live)}
        if stage.shift is not None:
            positions = arguments["position_ids"].to(hidden.device).expand(batch, -1)
            positions = positions - stage.shift.to(hidden.device)[:, None]
            made["position_ids"] = positions
            made["position_embeddings"] = self._decoder.text.rotary_emb(hidden, position_ids=positions)
        if arguments.get("cache_position") is not None:
            start = self.cache.get_seq_length(stage.cut)
            made["cache_position"] = positions_behind(None, hidden) + start
        return made
