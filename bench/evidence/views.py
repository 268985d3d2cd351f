"""Photographs as an encoder sees them: what pruners read, and what a language model would consume."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from bench.agreement import Encoder, Photograph


@dataclass(frozen=True)
class Views:
    """Crops of photographs in one encoder.

    Attributes:
        layers: 0-based encoder layer -> its output ``[B, N, C]``, patches only.
        consumed: ``[B, N, C]``, the last but one layer's output, which most language models take.
        received: ``[B, N]``, attention received in the last layer, mean over heads and queries.
    """

    layers: dict[int, torch.Tensor]
    consumed: torch.Tensor
    received: torch.Tensor

    def __len__(self) -> int:
        return len(self.consumed)


@torch.no_grad()
def views(
    encoder: Encoder, photographs: Iterable[Photograph], layers: Sequence[int], size: int, crops: int
) -> Views:
    """Of all crops, those of a photograph in a row; in float32."""
    patches = (size // encoder.model.config.patch_size) ** 2
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    consumed, received = [], []
    for photograph in photographs:
        pixels = encoder.pixels(photograph.crops(size, crops))
        out = encoder.model(pixels, output_hidden_states=True, output_attentions=True)
        for layer, parts in found.items():
            parts.append(out.hidden_states[layer + 1][:, -patches:].clone())
        consumed.append(out.hidden_states[-2][:, -patches:].clone())
        received.append(out.attentions[-1].mean(dim=(1, 2))[:, -patches:].clone())
    return Views(
        {layer: torch.cat(parts) for layer, parts in found.items()}, torch.cat(consumed), torch.cat(received)
    )
