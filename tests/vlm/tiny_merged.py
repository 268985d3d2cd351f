"""What a pruner of units of patches is given, and what is handed over: by us, and by transformers alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp import PrunerConfig, Selection
from ocvtp.vlm.encode.encode import encode
from ocvtp.vlm.families import adapter_for
from ocvtp.vlm.options import Options
from ocvtp.vlm.resolving import resolve
from tests.vlm.family import Inputs
from tests.vlm.tiny_llava import PLAIN, WIDTH


class Probe(torch.nn.Module):
    """Keeps the tokens it is told to, and remembers what it is shown.

    Args:
        unit: patches along the side of a token.
        layer: to read.
        indices: ``[pictures, k]``, ascending.
    """

    def __init__(self, unit: int, layer: int, indices: torch.Tensor) -> None:
        super().__init__()
        self.config = PrunerConfig(
            in_dim=WIDTH, hidden_dim=96, slot_dim=32, ffn_dim=64, layer=layer, unit=unit
        )
        self.indices = indices
        self.features = self.scores = torch.empty(0)

    def forward(
        self, features: torch.Tensor, keep: int, *, fill_scores: torch.Tensor, **options: Any
    ) -> Selection:
        assert keep == self.indices.shape[1]
        self.features, self.scores = features, fill_scores
        return Selection(self.indices, torch.full((len(self.indices),), keep), tokens=features.shape[1])


@dataclass(frozen=True)
class Sight:
    """Of a few pictures.

    Attributes:
        features: ``[pictures, units, C]`` of the early layer.
        scores: ``[pictures, units]`` received attention.
        rows: ``[pictures, units, D]`` for the language model.
    """

    features: torch.Tensor
    scores: torch.Tensor
    rows: torch.Tensor


def blocks(patches: torch.Tensor, unit: int) -> torch.Tensor:
    """``[pictures, patches, C] -> [pictures, units, unit * unit, C]``, patch by patch."""
    side = round(patches.shape[1] ** 0.5)
    across = side // unit
    found = [
        [(unit * row + down) * side + unit * column + right for down in range(unit) for right in range(unit)]
        for row in range(across)
        for column in range(across)
    ]
    return patches[:, torch.tensor(found)]


@torch.no_grad()
def upstream(
    build: Callable[[str], Any], tower: str, pixels: torch.Tensor, unit: int, read: int, scored: int
) -> Sight:
    """What transformers makes of ``pixels``, with eager attention for the scores.

    Args:
        build: makes the model, given an attention implementation.
        tower: its name.
        pixels: as the model takes them.
        unit: patches along the side of a token.
        read: the layer of the features.
        scored: the layer of the scores.
    """
    pictures = pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
    model, eager = build("sdpa"), build("eager")
    early = getattr(model.model, tower)(pictures, output_hidden_states=True).hidden_states[read + 1]
    attention = getattr(eager.model, tower)(pictures, output_attentions=True).attentions[scored]
    first = int(model.config.model_type == "internvl")  # after a class token
    received = attention.mean((1, 2))[:, first:, None]
    made = model.model.get_image_features(pixels, return_dict=True).pooler_output
    made = made if isinstance(made, torch.Tensor) else torch.cat(list(made))
    return Sight(
        blocks(early[:, first:], unit).mean(2),
        blocks(received, unit).sum((2, 3)),
        made.reshape(len(pictures), -1, made.shape[-1]),
    )


@torch.no_grad()
def ours(model: Any, pixels: torch.Tensor, probe: Probe) -> Sight:
    """What the adapter shows ``probe``, and the rows of what it keeps ``[pictures, k, D]``."""
    adapter = adapter_for(model)
    settings, _ = resolve(adapter, Options(probe, keep=probe.indices.shape[1], **PLAIN))
    kept = encode(adapter, {"pixel_values": pixels}, settings, None)["image"]
    assert torch.equal(kept.slots, probe.indices.flatten())
    return Sight(probe.features, probe.scores, torch.stack(kept.rows))


def compare(
    build: Callable[[str], Any],
    tower: str,
    pixels: torch.Tensor,
    unit: int,
    *,
    read: int = 2,
    scored: int = -1,
) -> None:
    """Features and scores shown, and rows handed over, are those of transformers, for a few and for all."""
    want = upstream(build, tower, pixels, unit, read, scored)
    pictures, units = want.scores.shape
    order = torch.stack(
        [torch.randperm(units, generator=torch.Generator().manual_seed(i)) for i in range(pictures)]
    )
    for keep in {1, units // 2, units - 1, units}:
        indices = order[:, :keep].sort(1).values
        got = ours(build("sdpa"), pixels, Probe(unit, read, indices))
        torch.testing.assert_close(got.features, want.features, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.scores, want.scores, atol=1e-6, rtol=1e-4)
        rows = want.rows.gather(1, indices[:, :, None].expand(-1, -1, want.rows.shape[2]))
        torch.testing.assert_close(got.rows, rows, atol=1e-5, rtol=1e-4)
        if keep == units:
            assert torch.equal(got.rows, rows)
    assert want.rows.std(1).mean() > 0.01  # tokens differ, so the wrong ones would be noticed
    assert want.scores.std(1).mean() > 1e-4


@torch.no_grad()
def first_mask(model: Any, layer: int, inputs: Inputs, **generating: Any) -> torch.Tensor:
    """Who attends to whom ``[B, 1, S, S]`` in a layer of the language model, the first time it runs.

    Args:
        model: with eager attention.
        layer: of its language model.
        inputs: of a call.
        generating: options of ``generate``; ``forward`` is called without any.
    """
    seen: list[torch.Tensor] = []

    def look(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Inputs) -> None:
        seen.append(kwargs["attention_mask"])

    attention = model.model.language_model.layers[layer].self_attn
    handle = attention.register_forward_pre_hook(look, with_kwargs=True)
    try:
        if generating:
            model.generate(**inputs, **generating)
        else:
            model(**inputs)
    finally:
        handle.remove()
    mask = seen[0]
    return mask if mask.dtype == torch.bool else mask > -1
