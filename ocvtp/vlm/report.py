"""What :func:`ocvtp.apply` did."""

from __future__ import annotations

from dataclasses import dataclass

from ocvtp.vlm.adapter import Positions, Route


@dataclass(frozen=True)
class PruneReport:
    """What was patched, and what it will do to every image.

    Attributes:
        family: ``config.model_type`` of the model.
        tower: ``model_type`` of its vision tower.
        read_layer: 0-based index of the encoder layer whose output the pruner reads.
        consumed_layers: encoder layers whose outputs the language model consumes.
        num_layers: layers of the tower; those after the deepest consumed one never run.
        attention: attention backend of the tower.
        backend: backend of the fused operations on the device the tower is on now.
        precision: of the pruner's matrix products there.
        captured: whether shapes that come back replay a CUDA graph.
        refine: rounds that move kept tokens to where they cover more.
        tokens_before: image tokens per image that the unpruned model feeds its language model.
        tokens_after: image tokens per image that are left; includes the class token where the model keeps it.
        positions: numbering of the kept tokens, ``"compact"`` or ``"original"``.
        route: how the kept rows reach the model: ``"mm_encoder_outputs"`` (transformers >= 5.18) or
            ``"inputs_embeds"``.
    """

    family: str
    tower: str
    read_layer: int
    consumed_layers: tuple[int, ...]
    num_layers: int
    attention: str
    backend: str
    precision: str
    captured: bool
    refine: int
    tokens_before: int
    tokens_after: int
    positions: Positions
    route: Route

    def __str__(self) -> str:
        share = self.tokens_after / self.tokens_before
        consumed = ", ".join(str(layer) for layer in self.consumed_layers)
        rounds = f", {self.refine} rounds of refinement" if self.refine else ""
        rows = [
            ("image tokens", f"{self.tokens_before} -> {self.tokens_after} per image ({share:.1%})"),
            ("tower", f"{self.tower}, {self.num_layers} layers, {self.attention} attention"),
            ("pruner reads", f"layer {self.read_layer}{rounds}"),
            ("model consumes", f"layer {consumed}; later layers are skipped"),
            ("positions", self.positions),
            ("kernels", f"{self.backend}, {self.precision}{', CUDA graphs' if self.captured else ''}"),
            ("hand-over", self.route),
        ]
        return "\n".join([f"ocvtp on {self.family}", *(f"  {name:<15}{value}" for name, value in rows)])
