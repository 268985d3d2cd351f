"""What :func:`ocvtp.apply` did."""

from __future__ import annotations

from dataclasses import dataclass

from ocvtp.vlm.contracts.settings import Merge, Positions, Route


@dataclass(frozen=True)
class PruneReport:
    """What was patched, and what it will do to every image.

    Attributes:
        family: ``config.model_type`` of the model.
        selector: the pruner's class, or the rule.
        tower: ``model_type`` of its vision tower.
        read_layer: 0-based index of the encoder layer whose output the pruner reads; ``None`` where
            nobody reads one.
        consumed_layers: encoder layers whose outputs the language model consumes.
        num_layers: layers of the tower; those after the deepest consumed one never run.
        attention: attention backend of the tower.
        backend: backend of the fused operations on the device the tower is on now.
        precision: of the pruner's matrix products there.
        captured: whether shapes that come back replay a CUDA graph.
        refine: rounds that move kept tokens to where they cover more.
        keep: the budget in words.
        unit: patches along each side of a token.
        tokens_before: image tokens per image that the unpruned model feeds its language model; ``None`` where
            images differ.
        tokens_after: image tokens per image that are left, with what is always kept (class token); ``None``
            where images differ.
        positions: numbering of the kept tokens, ``"compact"`` or ``"original"``.
        route: how the kept rows reach the model: ``"mm_encoder_outputs"`` (transformers >= 5.18) or
            ``"inputs_embeds"``.
        kept_rows_only: whether the end of the consumed layer is computed for kept tokens only.
        merge: where dropped tokens are averaged into their nearest kept one: ``"projected"`` after the
            projector, ``"features"`` before it, or ``"off"``.
        weigh: whether the language model adds log(how many tokens a kept one stands for) to its logits.
        farthest: whether farthest points top up a pruner's tokens, rather than those that receive attention.
        inside: what drops tokens inside the language model, and how many, in words; empty: nothing does.
        before: whether anything is dropped before the language model.
        vision_captured: whether that is a graph of the whole vision side, rather than of the pruner.
        reasons: why merging or weights are off although ``"auto"`` would have them.
        method: of a rival method, its source, and what is our adaptation on this model.
        own_merge: whether a rival method merges tokens by its own rule.
    """

    family: str
    selector: str
    tower: str
    read_layer: int | None
    consumed_layers: tuple[int, ...]
    num_layers: int
    attention: str
    backend: str
    precision: str
    captured: bool
    refine: int
    keep: str
    unit: int
    tokens_before: int | None
    tokens_after: int | None
    positions: Positions
    route: Route
    kept_rows_only: bool = False
    merge: Merge = "off"
    weigh: bool = False
    farthest: bool = False
    reasons: tuple[str, ...] = ()
    method: str | None = None
    own_merge: bool = False
    inside: tuple[str, ...] = ()
    before: bool = True
    vision_captured: bool = False

    def __str__(self) -> str:
        rows = [
            *(self._before() if self.before else [("image tokens", self._tokens())]),
            *zip(("inside", *[""] * len(self.inside)), self.inside, strict=False),
            ("positions", self.positions),
            ("kernels", f"{self.backend}, {self.precision}{self._graphs()}"),
            ("hand-over", self.route),
        ]
        return "\n".join([f"ocvtp on {self.family}", *(f"  {name:<15}{value}" for name, value in rows)])

    def _before(self) -> list[tuple[str, str]]:
        """What happens before the language model."""
        consumed = ", ".join(str(layer) for layer in self.consumed_layers)
        rest = " for kept tokens only" if self.kept_rows_only else ""
        return [
            ("image tokens", self._tokens()),
            ("tower", f"{self.tower}, {self.num_layers} layers, {self.attention} attention"),
            ("chosen by", self.selector if self.method else f"{self.selector}, {self._read()}"),
            *([("", f"({self.method})")] if self.method else []),
            ("model consumes", f"layer {consumed}{rest}; later layers are skipped"),
            ("dropped tokens", self._dropped()),
            *(("", f"({reason})") for reason in self.reasons),
        ]

    def _read(self) -> str:
        """What it chooses by."""
        rounds = f", {self.refine} round{'s' * (self.refine > 1)} of refinement" if self.refine else ""
        reads = "no layer" if self.read_layer is None else f"layer {self.read_layer}"
        topped = ", topped up by farthest points" if self.farthest else ""
        return f"which reads {reads}{topped}{rounds}"

    def _dropped(self) -> str:
        """What becomes of them."""
        merged = {
            "off": "",
            "projected": "averaged into the nearest kept one",
            "features": "averaged into the nearest kept one before the projector",
        }[self.merge]
        merged = "merged by its own rule" if self.own_merge else merged
        weighed = "weighed by proportional attention" if self.weigh else ""
        return ", ".join(part for part in (merged, weighed) if part) or "thrown away"

    def _graphs(self) -> str:
        """What is replayed."""
        if self.vision_captured:
            return ", one CUDA graph of the vision side"
        return ", CUDA graphs" if self.captured else ""

    def _tokens(self) -> str:
        of = "" if self.unit == 1 else f", each {self.unit} x {self.unit} patches"
        if self.tokens_before is None or self.tokens_after is None:
            return f"{self.keep} per image{of}"
        share = self.tokens_after / self.tokens_before
        return f"{self.tokens_before} -> {self.tokens_after} per image ({share:.1%}){of}"
