"""Everything that chooses tokens here: rivals without training, the pruner as published, and remedies."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.evidence.views import Views
from ocvtp import OCPruner, Selection, methods
from ocvtp.pruner.noise import seeded_normal
from ocvtp_kernels.coverage import coverage_error, refine
from ocvtp_kernels.selection import select_tokens
from ocvtp_kernels.slot_attention import slot_attention
from ocvtp_kernels.slot_attention.reference import encode, layer_norm

#: Rounds after which k-medoids are taken as converged.
CONVERGED = 15


class Choice(NamedTuple):
    """What a selector chose, and what its slots did, where there are any."""

    indices: torch.Tensor  # [B, keep]
    live: torch.Tensor | None = None  # [B], slots that own a token
    distinct: torch.Tensor | None = None  # [B], kept tokens that are some slot's own choice


Rival = Callable[[Views, torch.Tensor, int, int], Choice]
"""Of views, the features it reads, a budget and a seed."""


def _plain(select: Callable[..., Selection], rounds: int = 0) -> Rival:
    def choose(views: Views, x: torch.Tensor, keep: int, seed: int) -> Choice:
        return Choice(_refined(x, select(x, keep).indices, rounds))

    return choose


def _random(rounds: int = 0) -> Rival:
    def choose(views: Views, x: torch.Tensor, keep: int, seed: int) -> Choice:
        return Choice(_refined(x, methods.random_tokens(x, keep, seed=seed * len(x)).indices, rounds))

    return choose


def _attention(views: Views, x: torch.Tensor, keep: int, seed: int) -> Choice:
    return Choice(methods.attention_top_k(views.received, keep).indices)


def _on_consumed(views: Views, x: torch.Tensor, keep: int, seed: int) -> Choice:
    return Choice(methods.k_medoids(views.consumed, keep, rounds=CONVERGED).indices)


RANDOM = "random"
#: Those that draw at random, measured with several seeds.
DRAWN = {RANDOM, "random + 3 rounds"}
RIVALS: dict[str, Rival] = {
    RANDOM: _random(),
    "uniform grid": _plain(methods.grid),
    "farthest point": _plain(methods.farthest_point),
    "k-medoids": _plain(functools.partial(methods.k_medoids, rounds=CONVERGED)),
    "greedy DPP": _plain(methods.greedy_dpp),
    "attention top-k": _attention,
    "random + 3 rounds": _random(3),
    "uniform grid + 3 rounds": _plain(methods.grid, 3),
    "k-medoids of what is consumed": _on_consumed,
}


# ------------------------------------------------------------------------------------------------- pruner


Variant = Callable[[OCPruner, Views, torch.Tensor, int, int], Choice]
"""Of a pruner, views, the features it reads, a budget and a seed."""


def _choice(attention: torch.Tensor, indices: torch.Tensor, from_slots: torch.Tensor) -> Choice:
    """``attention`` is ``[B, K, N]``."""
    owner = attention.argmax(dim=1)
    live = torch.zeros_like(attention[:, :, 0]).scatter_(1, owner, 1.0).sum(dim=1)
    return Choice(indices, live, from_slots)


def _attention_of(
    pruner: OCPruner, x: torch.Tensor, slots: int, seed: int, noise: torch.Tensor | None = None
) -> torch.Tensor:
    selection = pruner(
        x, 1, noise=noise, seed=seed, num_slots=slots, return_attention=True, batch_invariant=False
    )
    assert selection.slot_attention is not None
    return selection.slot_attention


def published(pruner: OCPruner, views: Views, x: torch.Tensor, keep: int, seed: int) -> Choice:
    """One slot per token of the budget, each slot's top token, filled up by received attention."""
    attention = _attention_of(pruner, x, keep, seed)
    return _choice(attention, *select_tokens(attention, keep, views.received))


def refined(rounds: int, on_consumed: bool = False) -> Variant:
    """:func:`published`, and so many rounds."""

    def choose(pruner: OCPruner, views: Views, x: torch.Tensor, keep: int, seed: int) -> Choice:
        found = published(pruner, views, x, keep, seed)
        return found._replace(indices=_refined(views.consumed if on_consumed else x, found.indices, rounds))

    return choose


def with_slots(factor: float) -> Variant:
    """More or fewer slots than tokens to keep."""

    def choose(pruner: OCPruner, views: Views, x: torch.Tensor, keep: int, seed: int) -> Choice:
        attention = _attention_of(pruner, x, max(2, round(factor * keep)), seed)
        return _choice(attention, *select_tokens(attention, keep, views.received))

    return choose


def with_noise(scale: float) -> Variant:
    """Initial slots nearer to their common mean, or farther."""

    def choose(pruner: OCPruner, views: Views, x: torch.Tensor, keep: int, seed: int) -> Choice:
        noise = scale * seeded_normal(keep, pruner.config.slot_dim, seed)[None].to(x.device)
        attention = _attention_of(pruner, x, keep, seed, noise)
        return _choice(attention, *select_tokens(attention, keep, views.received))

    return choose


def best_seed(seeds: int) -> Variant:
    """Of so many draws of the noise, for each image the one of the least coverage error."""

    def choose(pruner: OCPruner, views: Views, x: torch.Tensor, keep: int, seed: int) -> Choice:
        drawn = [published(pruner, views, x, keep, seeds * seed + i) for i in range(seeds)]
        best = torch.stack([coverage_error(x, one.indices) for one in drawn]).argmin(dim=0)
        image = torch.arange(len(x), device=x.device)
        return Choice(*(torch.stack(values)[best, image] for values in zip(*drawn, strict=True)))

    return choose


def nearest_mean(pruner: OCPruner, views: Views, x: torch.Tensor, keep: int, seed: int) -> Choice:
    """The token nearest the slot's mean of the features, weighted by attention, instead of its top token."""
    attention = _attention_of(pruner, x, keep, seed)
    mean = attention / attention.sum(dim=2, keepdim=True) @ x
    return _choice(attention, *select_tokens(-torch.cdist(mean, x), keep, views.received))


def nearest_owned_mean(pruner: OCPruner, views: Views, x: torch.Tensor, keep: int, seed: int) -> Choice:
    """The same, of the tokens that the slot owns; a slot that owns none keeps its top token."""
    attention = _attention_of(pruner, x, keep, seed)
    owned = attention == attention.amax(dim=1, keepdim=True)
    weight = torch.where(owned.any(dim=2, keepdim=True), owned.to(x.dtype), attention)
    mean = weight / weight.sum(dim=2, keepdim=True) @ x
    distance = torch.cdist(mean, x)
    far = torch.where(owned | ~owned.any(dim=2, keepdim=True), distance, float("inf"))
    return _choice(attention, *select_tokens(-far, keep, views.received))


def by_logits(pruner: OCPruner, views: Views, x: torch.Tensor, keep: int, seed: int) -> Choice:
    """The token most like the slot, whether or not another slot is still more like it."""
    attention = _attention_of(pruner, x, keep, seed)
    return _choice(attention, *select_tokens(slot_logits(pruner, x, keep, seed), keep, views.received))


@torch.no_grad()
def slot_logits(pruner: OCPruner, x: torch.Tensor, slots: int, seed: int) -> torch.Tensor:
    """``[B, K, N]``: what the last iteration's softmax over slots is taken of."""
    weights, config = pruner.weights(), pruner.config
    noise = seeded_normal(slots, config.slot_dim, seed)[None].to(x.device)
    entering, _ = slot_attention(
        x, pruner.initial_slots(noise), weights, num_iters=config.num_iters - 1, eps=config.eps
    )
    tokens = layer_norm(encode(x, weights), weights.input_norm_weight, weights.input_norm_bias)
    queries = layer_norm(entering, weights.slot_norm_weight, weights.slot_norm_bias) @ weights.query_weight.mT
    return queries @ (tokens @ weights.key_weight.mT).mT * config.slot_dim**-0.5


def fill_by_attention_to_slots(
    pruner: OCPruner, views: Views, x: torch.Tensor, keep: int, seed: int
) -> Choice:
    """Fill up with tokens that some slot attends to most, instead of received attention."""
    attention = _attention_of(pruner, x, keep, seed)
    return _choice(attention, *select_tokens(attention, keep))


def fill_uncovered(pruner: OCPruner, views: Views, x: torch.Tensor, keep: int, seed: int) -> Choice:
    """Fill up with the tokens farthest from the slots' own choices."""
    attention = _attention_of(pruner, x, keep, seed)
    picks = attention.argmax(dim=2)
    rows = x.gather(1, picks[:, :, None].expand(-1, -1, x.shape[2]))
    return _choice(attention, *select_tokens(attention, keep, torch.cdist(x, rows).amin(dim=2)))


PUBLISHED = "as published"
VARIANTS: dict[str, Variant] = {
    PUBLISHED: published,
    "+ 1 round": refined(1),
    "+ 3 rounds": refined(3),
    "+ 3 rounds on what is consumed": refined(3, on_consumed=True),
    "token nearest the slot's mean": nearest_mean,
    "token nearest the mean of the slot's own": nearest_owned_mean,
    "token most like the slot (logits)": by_logits,
    "fill by slot attention": fill_by_attention_to_slots,
    "fill by what is least covered": fill_uncovered,
    "half as many slots": with_slots(0.5),
    "one and a half times the slots": with_slots(1.5),
    "twice the slots": with_slots(2.0),
    "no noise": with_noise(0.0),
    "half the noise": with_noise(0.5),
    "twice the noise": with_noise(2.0),
    "best of 4 seeds": best_seed(4),
}


def _refined(x: torch.Tensor, indices: torch.Tensor, rounds: int) -> torch.Tensor:
    return refine(x, indices, rounds) if rounds else indices
