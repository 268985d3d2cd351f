"""CLIP and SigLIP towers: from transformers' way to the layer's end for kept rows only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.micro.gates import require_equal, require_error, worst_error
from bench.tower.step import Results, Step
from ocvtp.vlm.towers.clip import HeldLayer, WholeLayer, root, run_tower

#: Rows kept of an image.
KEEPS = (64, 160)
#: Largest relative error of an image's rows and of its scores, against transformers.
_BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 5e-2)}


@dataclass(frozen=True)
class EncoderShape:
    """A CLIP or SigLIP tower; FLOPs are those of matrix products, two for a multiply-add.

    Attributes:
        class_token: whether it has one (CLIP); else a SigLIP without its pooling head.
    """

    width: int
    mlp: int
    layers: int
    heads: int
    image: int
    patch: int
    class_token: bool

    @property
    def tokens(self) -> int:
        """The class token among them."""
        return (self.image // self.patch) ** 2 + self.class_token

    @property
    def consumed(self) -> int:
        """The layer that a LLaVA reads: the last but one."""
        return self.layers - 2

    @property
    def projection(self) -> int:
        """One of the four projections of attention, for all tokens."""
        return 2 * self.tokens * self.width**2

    @property
    def scores(self) -> int:
        """Queries times keys."""
        return 2 * self.tokens**2 * self.width

    def rest(self, rows: int) -> int:
        """A layer without queries, keys and values, for some of its tokens."""
        attention = 4 * rows * self.tokens * self.width
        return attention + 2 * rows * self.width**2 + 4 * rows * self.width * self.mlp

    @property
    def layer(self) -> int:
        """A whole layer."""
        return 3 * self.projection + self.rest(self.tokens)

    def upto(self, layers: int) -> int:
        """The patch embedding and some layers."""
        return 2 * (self.image // self.patch) ** 2 * 3 * self.patch**2 * self.width + layers * self.layer

    def build(self) -> Any:
        """A tower with random weights, on sdpa attention."""
        from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

        sizes = {
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "image_size": self.image,
            "patch_size": self.patch,
            "attn_implementation": "sdpa",
        }
        torch.manual_seed(0)
        if self.class_token:
            return CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()
        return SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False)).eval()

    def bench(self, batch: int, device: torch.device) -> EncoderBench:
        """With some images on a device."""
        return EncoderBench(self, batch, device)


ENCODERS = {
    "clip-l-336": EncoderShape(1024, 4096, 24, 16, 336, 14, class_token=True),
    "siglip-so400m": EncoderShape(1152, 4304, 27, 16, 384, 14, class_token=False),
}


class EncoderBench:
    """A tower, images, and what transformers makes of them.

    Args:
        shape: of the tower.
        batch: images.
        device: float32 on a CPU, bfloat16 on a GPU.
        keeps: numbers of rows kept.
    """

    def __init__(
        self, shape: EncoderShape, batch: int, device: torch.device, keeps: Sequence[int] = KEEPS
    ) -> None:
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.batch = batch
        self._shape, self._keeps = shape, tuple(keeps)
        self._tower = shape.build().to(device, self.dtype)
        # Recording hidden states or maps leaves hooks behind: a tower for each, with the same weights.
        self._eager, self._states = _twin(self._tower), _twin(self._tower)
        self._eager.set_attn_implementation("eager")
        self._layer = root(self._tower).encoder.layers[shape.consumed]
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(batch, 3, shape.image, shape.image, generator=generator)
        self._pixels = pixels.to(device, self.dtype)
        self._kept = {
            keep: torch.stack(
                [torch.randperm(shape.tokens, generator=generator)[:keep].sort().values for _ in range(batch)]
            ).to(device)
            for keep in (*keeps, shape.tokens)
        }
        with torch.inference_mode():
            hidden = self._states(self._pixels, output_hidden_states=True).hidden_states
            maps = self._eager(self._pixels, output_attentions=True).attentions
            self._input, self._rows = hidden[shape.consumed], hidden[shape.consumed + 1]
            self._scores = maps[shape.consumed].float().mean((1, 2))

    def steps(self) -> list[Step]:
        """All steps, each leaving out something that the one before computes."""
        shape = self._shape
        layer, scores, again = shape.layer, shape.scores, 2 * shape.projection

        def held(rows: int) -> int:
            return 3 * shape.projection + scores + shape.rest(rows)

        def tower(
            what: str, flops: int, run: Callable[[], Results], check: Callable[[Results], None]
        ) -> Step:
            return Step("tower", what, self.batch * flops, run, check)

        def alone(
            what: str, flops: int, run: Callable[[], Results], check: Callable[[Results], None]
        ) -> Step:
            return Step("consumed layer", what, self.batch * flops, run, check)

        def kept(keep: int) -> str:
            return f"and the layer's end for {keep} rows"

        below, most_first = shape.upto(shape.consumed), sorted(self._keeps, reverse=True)
        return [
            tower("transformers, maps of every layer", shape.upto(shape.layers), self._official, self._near),
            tower("transformers, no scores", shape.upto(shape.layers), self._upstream, self._same),
            tower("to the consumed layer, no scores", below + layer, self._loop, self._same),
            tower("and scores, projected again", below + layer + scores + again, self._scored, self._same),
            *(
                tower(kept(keep), below + held(keep), partial(self._held, keep), self._near)
                for keep in most_first
            ),
            alone("no scores", layer, self._whole, self._same),
            alone("and scores, projected again", layer + scores + again, self._whole_scored, self._same),
            *(
                alone(kept(keep), held(keep), partial(self._alone_held, keep), self._near)
                for keep in (shape.tokens, *most_first)
            ),
        ]

    def _official(self) -> Results:
        """As the published code asks for it: eager attention, everything of every layer."""
        out = self._eager(self._pixels, output_attentions=True, output_hidden_states=True)
        at = self._shape.consumed
        return out.hidden_states[at + 1], out.attentions[at].mean(dim=1).mean(dim=1)

    def _upstream(self) -> Results:
        out = self._states(self._pixels, output_hidden_states=True)
        return (out.hidden_states[self._shape.consumed + 1],)

    def _loop(self) -> Results:
        at = self._shape.consumed
        return (run_tower(self._tower, self._pixels, {at}).outputs[at],)

    def _scored(self) -> Results:
        at = self._shape.consumed
        run = run_tower(self._tower, self._pixels, {at})
        return run.outputs[at], run.received_attention("auto")

    def _held(self, keep: int) -> Results:
        run = run_tower(self._tower, self._pixels, {self._shape.consumed}, hold=True)
        scores = run.received_attention("auto")
        return run.finish(self._kept[keep]), scores

    def _whole(self) -> Results:
        out = self._layer(self._input, None)
        return (out[0] if isinstance(out, tuple) else out,)

    def _whole_scored(self) -> Results:
        (out,) = self._whole()
        return out, WholeLayer(self._layer, self._input, out).received_attention("auto")

    def _alone_held(self, keep: int) -> Results:
        held = HeldLayer(self._layer, self._input)
        scores = held.received_attention("auto")
        return held.rows(self._kept[keep]), scores

    def _same(self, results: Results) -> None:
        require_equal("the consumed layer", results[0], self._rows)
        self._near(results)

    def _near(self, results: Results) -> None:
        """Rows, which tell by their number whose they are, and scores."""
        rows_bound, scores_bound = _BOUNDS[self.dtype]
        rows, *scores = results
        kept = self._kept[rows.shape[1]]
        want = torch.stack([self._rows[i, row] for i, row in enumerate(kept)])
        if rows.shape[1] == self._shape.tokens:
            want = self._rows
        require_error("rows", worst_error(rows.flatten(1), want.flatten(1)), rows_bound)
        for given in scores:
            require_error("scores", worst_error(given.float(), self._scores), scores_bound)


def _twin(tower: Any) -> Any:
    """Another tower with the same weights, not a copy of them."""
    return copy.deepcopy(tower, {id(weight): weight for weight in tower.parameters()})
