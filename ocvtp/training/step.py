"""One training step: what it draws, and its loss."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

from ocvtp.pruner import OCPruner
from ocvtp.training.recipe import Recipe
from ocvtp_kernels.reconstruction import area_weighted_mse

_OFFICIAL_VISIBLE = 24


class Draw(NamedTuple):
    """Everything random about one step but dropout, on the CPU.

    Attributes:
        noise: ``[B, K, D]`` standard normal, K drawn from the recipe's numbers of slots.
        hidden: ``[B, N]`` bool, True where the decoder does not see the token.
    """

    noise: torch.Tensor
    hidden: torch.Tensor

    def part(self, first: int, last: int) -> Draw:
        """What belongs to images ``first`` to ``last`` of the batch, ``last`` excluded."""
        return Draw(self.noise[first:last], self.hidden[first:last])


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator that depends on its arguments alone: no state to save, and every process has the same."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw(recipe: Recipe, batch: int, tokens: int, width: int, *purpose: object) -> Draw:
    """What a step of ``batch`` images of ``tokens`` tokens draws; ``purpose`` tells steps apart.

    A number of slots above ``tokens`` is never drawn.
    """
    source = generator(recipe.seed, *purpose)
    choices = [count for count in recipe.slots if count <= tokens]
    if not choices:
        raise ValueError(f"images have {tokens} tokens, fewer than any of the recipe's slots {recipe.slots}")
    slots = choices[int(torch.randint(len(choices), (), generator=source))]
    noise = torch.randn(batch, slots, width, generator=source)
    return Draw(noise, hidden_tokens(recipe, batch, tokens, source))


def hidden_tokens(recipe: Recipe, batch: int, tokens: int, source: torch.Generator) -> torch.Tensor:
    """``[batch, tokens]`` bool: which tokens the decoder must not see.

    Official class ``ARRandTransformerDecoder``: of half the images any number but all is visible, of the
    others ``int(0.1 * 256) - 1``; here that is the same share of ``tokens``. At least one is always hidden.
    """
    few = _OFFICIAL_VISIBLE if recipe.official_visible else max(0, int(recipe.visible * tokens) - 1)
    fixed = torch.full((batch,), min(few, tokens - 1))
    free = torch.randint(0, tokens, (batch,), generator=source)
    visible = torch.where(torch.rand(batch, generator=source) < recipe.any_visible, free, fixed)
    rank = torch.rand(batch, tokens, generator=source).argsort(dim=1).argsort(dim=1)
    return rank >= visible[:, None]


def step_loss(pruner: OCPruner, features: torch.Tensor, draw: Draw, recipe: Recipe) -> torch.Tensor:
    """Area-weighted reconstruction error of each image ``[B]``; differentiable in the pruner's parameters.

    Args:
        pruner: with a decoder, in training mode or not.
        features: ``[B, N, C]``, on the pruner's device.
        draw: of these images.
        recipe: says how tokens weigh, and how far gradients go.
    """
    device = features.device
    out = pruner.reconstruct(
        features,
        num_slots=draw.noise.shape[1],
        noise=draw.noise.to(device, non_blocking=True),
        mask=draw.hidden.to(device, non_blocking=True),
        truncate=recipe.truncate,
    )
    return area_weighted_mse(
        out.reconstruction,
        features,
        out.slot_attention,
        empty_slots=recipe.empty_slots,
        reduction="none",
        power=recipe.power,
        cap=recipe.cap,
    )
