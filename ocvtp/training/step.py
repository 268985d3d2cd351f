"""One training step: what it draws, and its loss."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import nn

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
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed in ``[0, 2**63)`` that depends on its arguments alone."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw(
    recipe: Recipe, batch: int, tokens: int, width: int, *purpose: object, slots: int | None = None
) -> Draw:
    """What a step of ``batch`` images of ``tokens`` tokens draws; ``purpose`` tells steps apart.

    A number of slots above ``tokens`` is never drawn; ``slots`` gives it instead.
    """
    source = generator(recipe.seed, *purpose)
    if slots is None:
        choices = slot_counts(recipe, tokens)
        slots = choices[int(torch.randint(len(choices), (), generator=source))]
    noise = torch.randn(batch, slots, width, generator=source)
    return Draw(noise, hidden_tokens(recipe, batch, tokens, source))


def slot_counts(recipe: Recipe, tokens: int) -> list[int]:
    """The recipe's numbers of slots that images of ``tokens`` tokens can have.

    Raises:
        ValueError: there is none.
    """
    choices = [count for count in recipe.slots if count <= tokens]
    if not choices:
        raise ValueError(f"images have {tokens} tokens, fewer than any of the recipe's slots {recipe.slots}")
    return choices


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


class StepLoss(NamedTuple):
    """What a step computes.

    Attributes:
        loss: ``[B]``, area-weighted reconstruction error of each image, in units of ``feature_scale ** 2``.
        slot_attention: ``[B, K, N]`` of the last iteration, detached.
    """

    loss: torch.Tensor
    slot_attention: torch.Tensor


class Objective(nn.Module):
    """The loss as a module, because that is what data-parallel wrappers wrap.

    Args:
        pruner: with a decoder.
        recipe: says how tokens weigh, and how far gradients go.
    """

    def __init__(self, pruner: OCPruner, recipe: Recipe) -> None:
        super().__init__()
        self.pruner = pruner
        self.recipe = recipe

    def forward(self, features: torch.Tensor, noise: torch.Tensor, hidden: torch.Tensor) -> StepLoss:
        """Loss of ``features`` ``[B, N, C]`` under a :class:`Draw`, all on the pruner's device."""
        out = self.pruner.reconstruct(
            features, num_slots=noise.shape[1], noise=noise, mask=hidden, truncate=self.recipe.truncate
        )
        loss = area_weighted_mse(
            out.reconstruction,
            features,
            out.slot_attention,
            empty_slots=self.recipe.empty_slots,
            reduction="none",
            power=self.recipe.power,
            cap=self.recipe.cap,
        )
        return StepLoss(loss / self.pruner.config.feature_scale**2, out.slot_attention.detach())


def step_loss(pruner: OCPruner, features: torch.Tensor, draw: Draw, recipe: Recipe) -> torch.Tensor:
    """Loss of each image ``[B]``, see :class:`StepLoss`; differentiable in the pruner's parameters.

    Args:
        pruner: with a decoder, in training mode or not.
        features: ``[B, N, C]``, on the pruner's device.
        draw: of these images.
        recipe: says how tokens weigh, and how far gradients go.
    """
    noise, hidden = draw.noise.to(features.device), draw.hidden.to(features.device)
    return Objective(pruner, recipe)(features, noise, hidden).loss


def standard_deviation(features: torch.Tensor) -> float:
    """Of ``[B, N, C]`` about the mean of every channel, over images and tokens."""
    return float(features.double().var(dim=(0, 1), unbiased=False).mean().sqrt())


def live_slots(slot_attention: torch.Tensor) -> torch.Tensor:
    """``[B, K, N] -> [B]``: share of the slots that own a token, one that attends to no other slot more."""
    owner = slot_attention.argmax(dim=1)
    owned = torch.zeros_like(slot_attention[:, :, 0]).scatter_(1, owner, 1.0)
    return owned.mean(dim=1)


def distinct_picks(slot_attention: torch.Tensor) -> torch.Tensor:
    """``[B, K, N] -> [B]``: distinct top tokens of the slots, as a share of the slots."""
    top = slot_attention.argmax(dim=2)
    picked = torch.zeros_like(slot_attention[:, 0]).scatter_(1, top, 1.0)
    return picked.sum(dim=1) / slot_attention.shape[1]
