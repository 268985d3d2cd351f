"""What a user chose in :func:`ocvtp.apply`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from ocvtp.methods.in_llm import Method
from ocvtp.vlm.contracts.budgets import Budget
from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.contracts.selector import Selector
from ocvtp.vlm.contracts.steady import Replays
from ocvtp.watch import Watch

Positions = Literal["compact", "original"]
Route = Literal["mm_encoder_outputs", "inputs_embeds"]
Layout = Literal["layout", "official"]
Newlines = Literal["last", "rows", "all"]
Frames = Literal["each", "all"]
Tower = Literal["exact", "kept_rows"]
Merge = Literal["off", "projected", "features"]


@dataclass(frozen=True)
class Settings:
    """Immutable: a call works on the one it started with.

    Attributes:
        selector: who chooses, or the rival method that does.
        budget: how many tokens of an image.
        positions: numbering of the kept tokens.
        backend: of fused operations.
        route: how the kept rows reach the model.
        attention: attention implementation of the language model.
        layout: of tiled images: candidates as the model packs them, or all tokens as the official code.
        newlines: which of a packed image's newlines stay.
        frames: whether each frame of a video has a budget of its own, or all together one.
        tower: ``"kept_rows"`` computes the consumed layer for kept rows only, which rounds differently.
        columns: whether outputs say where the caller's columns went.
        merge: where dropped tokens are averaged into their nearest kept one: not at all, after the projector,
            or before it.
        weigh: whether the language model knows how many tokens a kept one stands for.
        before: whether tokens are dropped before the language model.
        inside: what drops tokens inside it, if anything does.
        watch: told which images were not finite.
        graphs: of the whole vision side, if it is recorded.
    """

    selector: Selector | Reducer
    budget: Budget
    positions: Positions
    backend: str
    route: Route
    attention: str
    layout: Layout = "layout"
    newlines: Newlines = "last"
    frames: Frames = "each"
    tower: Tower = "exact"
    columns: bool = False
    merge: Merge = "off"
    weigh: bool = False
    before: bool = True
    inside: Method | None = None
    watch: Watch = field(default_factory=Watch, compare=False, repr=False)
    graphs: Replays | None = None

    def close(self) -> None:
        """Free what is held on a device."""
        self.selector.close()
        if self.graphs is not None:
            self.graphs.close()

    @property
    def blocks(self) -> tuple[int, ...]:
        """Encoder layers whose attention is asked for, beside the consumed one's."""
        return self.selector.blocks if isinstance(self.selector, Reducer) else ()

    @property
    def standing(self) -> bool:
        """Whether kept tokens stand for others, so that somebody has to find out for which."""
        return self.merge != "off" or self.weigh

    @classmethod
    def default(cls, name: str) -> object:
        """The default of a field that has one."""
        return next(field.default for field in fields(cls) if field.name == name)
