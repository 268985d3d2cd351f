"""One call that reads a prompt: tokens go at the cuts, and layers behind get arguments that fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ocvtp.methods.in_llm.contract import Choice, Method, Numbering
from ocvtp.vlm.in_llm.decoder import Decoder
from ocvtp.vlm.in_llm.layout import Layout
from ocvtp.vlm.in_llm.masks import MaskMaker
from ocvtp.vlm.in_llm.rows import CutRows, Tap
from ocvtp.vlm.in_llm.squeeze import at_columns, renumbered, squeeze
from ocvtp.vlm.in_llm.stages import Stage, Trace


@dataclass(frozen=True)
class Seen:
    """What became of the vision tokens at one cut, for who asked to see it.

    Attributes:
        choice: the method's.
        rows: what it chose by.
        stage: the sequence behind; ``None`` where nothing was dropped.
    """

    choice: Choice
    rows: CutRows
    stage: Stage | None


class Prefill:
    """State of the call.

    Args:
        decoder: the language model.
        masks: its masks' maker.
        method: what drops tokens.
        numbering: of positions behind a cut.
        cache: that is filled; ``None``: none.
        vision: ``[B, L]`` bool.
        live: ``[B, L]`` bool; ``None``: no padding.
        said: columns of the prompt; those behind are drafts.
        embeddings: ``[B, L, D]``.
        seen: where to put what happens; ``None``: nowhere.
    """

    def __init__(
        self,
        decoder: Decoder,
        masks: MaskMaker,
        method: Method,
        numbering: Numbering,
        cache: Any,
        vision: torch.Tensor,
        live: torch.Tensor | None,
        said: int,
        embeddings: torch.Tensor,
        seen: list[Seen] | None,
    ) -> None:
        self._decoder, self._masks, self._method, self._numbering = decoder, masks, method, numbering
        self.cache = cache
        self._vision, self._live, self._said, self._embeddings = vision, live, said, embeddings
        self._seen = seen
        self._layout: Layout | None = None
        self._totals: tuple[int, ...] = ()
        self._memory: dict[str, torch.Tensor] = {}
        self._stages: list[Stage] = []
        self._arguments: dict[str, Any] = {}  # of layers behind the last cut
        self._before: tuple[torch.Tensor, dict[str, Any]] | None = None
        self._tap = Tap(None)
        self._choosing = False

    @property
    def trace(self) -> Trace | None:
        """What to leave on the cache."""
        return Trace(tuple(self._stages), self._vision.shape[1]) if self._stages else None

    def layer(
        self, number: int, hidden: torch.Tensor, arguments: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Input and arguments that a layer is to get.

        Args:
            number: 0-based, from the one before the first cut on.
            hidden: ``[B, S, D]`` that comes in.
            arguments: by name, as the language model passes them to every layer.
        """
        arguments = {**arguments, **self._arguments}
        if number in self._method.cuts:
            hidden = self._cut(self._method.cuts.index(number), hidden, arguments)
            arguments |= self._arguments
        if number + 1 in self._method.cuts:
            self._tap = Tap(arguments.get("past_key_values"))
            self._before = (hidden, dict(arguments))
            arguments["past_key_values"] = self._tap
        return hidden, arguments

    def end(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the language model's last norm is to get: a method may cut behind the last layer."""
        if self._choosing or self._decoder.depth not in self._method.cuts or self._before is None:
            return hidden
        return self._cut(len(self._method.cuts) - 1, hidden, {**self._before[1], **self._arguments})

    def _cut(self, cut: int, hidden: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        number = self._method.cuts[cut]
        layout = self._layout
        if layout is None:
            layout = Layout.of_prompt(self._vision, self._live, arguments.get("position_ids"), self._said)
            self._totals = layout.present
        self._layout = layout = _moved(layout, hidden.device)
        pairs = zip(layout.present, self._totals, strict=True)
        left = [self._method.left(cut, present, total) for present, total in pairs]
        kept = tuple(one[0] for one in left)
        if kept == layout.present and not any(one[1] for one in left):
            return hidden
        assert self._before is not None  # every cut has a layer before it
        rows = CutRows(
            self._decoder,
            number,
            hidden,
            layout,
            self._totals,
            self._before,
            self._tap,
            arguments,
            self._embeddings,
            self._memory,
        )
        self._choosing = True
        try:
            with torch.no_grad():
                choice = self._method.choose(cut, rows)
        finally:
            self._choosing = False
        squeezed = squeeze(hidden, layout, choice, kept)
        new, shift = squeezed.layout, None
        embeddings = tuple(at_columns(table, squeezed.index) for table in arguments["position_embeddings"])
        if self._numbering == "renumbered":
            positions, shift = renumbered(layout, squeezed)
            if self._stages and self._stages[-1].shift is not None:
                shift = shift + self._stages[-1].shift.to(shift.device)
            new = replace(new, positions=positions)
            embeddings = self._decoder.text.rotary_emb(squeezed.hidden, position_ids=positions)
        self._layout = new
        if number == self._method.cuts[-1]:
            self._before, self._tap = None, Tap(None)  # nobody asks any more
        stage = Stage(number, new.columns, new.positions, new.live, new.full, shift)
        self._stages.append(stage)
        if self._seen is not None:
            self._seen.append(Seen(choice, rows, stage))
        self._arguments = self._behind(stage, squeezed.hidden, arguments, embeddings)
        return squeezed.hidden

    def _behind(
        self, stage: Stage, hidden: torch.Tensor, arguments: dict[str, Any], embeddings: Any
    ) -> dict[str, Any]:
        """Arguments of the layers behind a cut, where they are others."""
        live = None if stage.full else stage.live
        made: dict[str, Any] = {"position_embeddings": tuple(embeddings)}
        made["attention_mask"] = self._masks(self.cache, stage.cut, hidden, live)
        columns = torch.arange(hidden.shape[1], device=hidden.device)
        # Flash attention alone reads them, and takes gaps for the ends of packed sequences.
        if arguments.get("position_ids") is not None:
            made["position_ids"] = columns[None]
        if arguments.get("cache_position") is not None:
            made["cache_position"] = columns
        return made


def _moved(layout: Layout, device: torch.device) -> Layout:
    """The layout where a layer computes: a model may lie on several devices."""
    if layout.live.device == device:
        return layout
    names = ("columns", "positions", "live", "vision", "text", "said")
    return replace(layout, **{name: getattr(layout, name).to(device) for name in names})
