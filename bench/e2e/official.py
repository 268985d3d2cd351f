"""The published code's dataflow around a whole model, restated by us: the baseline of the end-to-end figures.

Facts from the official repository (arXiv 2511.20439, commit 1755633), none of its code; bugs that change the
result (``K + 1`` slots, tokens dropped in hash order) are not restated, nor made slower than they are:

- the tower runs all its layers on all tokens with eager attention, and every layer keeps its attention map
  and its output (``output_attentions``, ``output_hidden_states``);
- the pruner runs in float32 as separate modules, with the last update nobody reads; LLaVA-NeXT's tiles are
  one sequence for it;
- Python loops on the host choose the tokens, one image at a time;
- the projector and the language model see the kept tokens, numbered afresh; LLaVA-NeXT's are followed by one
  newline.

There is no published code for Qwen-VL.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

from bench.e2e.prompts import Inputs
from bench.official import official_attention, official_selection
from ocvtp import OCPruner
from ocvtp.pruner.noise import seeded_normal
from ocvtp.vlm.encode.timing import Clock, stage

FAMILIES = ("llava", "llava_next")


class Kept(NamedTuple):
    """What the language model will see of each image."""

    indices: torch.Tensor  # [images, keep], ascending; of all tiles, tile by tile
    rows: torch.Tensor  # [images, keep or keep + 1, D]


class OfficialDataflow:
    """A LLaVA-1.5 or LLaVA-NeXT that runs as the published code has it.

    Args:
        model: unpatched.
        pruner: in float32.
        keep: tokens of each image.
        tf32: whether the pruner's products are TF32, as in the harness that the published figures are from.
        seed: of the slots.

    Raises:
        ValueError: a model of another family, or one that reads no layer counted from the end.
    """

    def __init__(self, model: Any, pruner: OCPruner, keep: int, *, tf32: bool = False, seed: int = 0) -> None:
        layer = model.config.vision_feature_layer if model.config.model_type in FAMILIES else None
        if not isinstance(layer, int) or layer >= 0:
            raise ValueError(f"no published code runs this {model.config.model_type}")
        self._model, self._pruner, self._keep = model, pruner, keep
        self._precision = "high" if tf32 else torch.get_float32_matmul_precision()
        # Recording maps leaves hooks behind: a tower of its own, with the same weights.
        tower = model.model.vision_tower
        self._tower = copy.deepcopy(tower, {id(weight): weight for weight in tower.parameters()})
        self._tower.set_attn_implementation("eager")
        noise = seeded_normal(keep, pruner.config.slot_dim, seed)[None].to(pruner.slot_mean.device)
        self._slots = pruner.initial_slots(noise).detach()

    @torch.no_grad()
    def encode(self, inputs: Inputs, clock: Clock | None = None) -> Kept:
        """Pixels to the rows of kept tokens."""
        model, pixels = self._model, inputs["pixel_values"]
        images = len(pixels)
        tiles = pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
        with stage(clock, "vision tower", pixels.device):
            seen = self._tower(tiles, output_attentions=True, output_hidden_states=True)
            at = len(seen.attentions) + model.config.vision_feature_layer
            read = seen.hidden_states[self._pruner.config.layer + 1][:, 1:]
            output = seen.hidden_states[at + 1][:, 1:]
            output = output.reshape(images, -1, output.shape[-1])
        with stage(clock, "pruner", pixels.device):
            features = read.float().reshape(images, -1, read.shape[-1])
            received = seen.attentions[at].mean(dim=1).mean(dim=1)[:, 1:].reshape(images, -1)
            indices = torch.stack([self._choose(features[i], received[i]) for i in range(images)])
            rows = torch.stack([output[i].index_select(0, indices[i]) for i in range(images)])
        with stage(clock, "projector", pixels.device):
            rows = model.model.multi_modal_projector(rows)
            if pixels.ndim == 5:
                newline = model.model.image_newline.to(rows).expand(images, 1, -1)
                rows = torch.cat([rows, newline], dim=1)
        return Kept(indices, rows)

    def _choose(self, features: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self._precision)
        try:
            attention = official_attention(features[None], self._slots, self._pruner.weights())
        finally:
            torch.set_float32_matmul_precision(before)
        kept = official_selection(attention, received, self._keep)
        return torch.tensor(kept, device=features.device)

    @torch.no_grad()
    def prepare(self, inputs: Inputs, clock: Clock | None = None) -> Inputs:
        """``inputs_embeds`` and ``attention_mask`` of the shortened prompts, one image in each."""
        return self.splice(inputs, self.encode(inputs, clock))

    @torch.no_grad()
    def splice(self, inputs: Inputs, kept: Kept) -> Inputs:
        """The same, of what :meth:`encode` made."""
        ids, rows = inputs["input_ids"], kept.rows.to(self._model.dtype)
        is_text = ids != self._model.config.image_token_id
        text = self._model.get_input_embeddings()(ids)
        joined = []
        for prompt, words, picture in zip(text, is_text, rows, strict=True):
            first = int((~words).nonzero()[0])  # waits for the GPU, as the published splicing does
            joined.append(torch.cat([prompt[:first], picture, prompt[first:][words[first:]]]))
        embeddings = torch.stack(joined)
        mask = torch.ones(embeddings.shape[:2], dtype=torch.int64, device=ids.device)
        return {"inputs_embeds": embeddings, "attention_mask": mask}
