"""Running the model on packed batches, and what it is trained to minimise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bench.testbed.packing import DENSE, Batch

_BACKGROUND = 0.2  # weight of a patch with nothing in it


@dataclass
class Outcome:
    """Of one batch.

    Attributes:
        loss: to minimise.
        parts: of it, by name.
        correct: ``[Q]`` bool, one for every question.
    """

    loss: torch.Tensor
    parts: dict[str, torch.Tensor]
    correct: torch.Tensor


class DenseHead(nn.Module):
    """Says what every patch shows, from the tower's output. Not part of the shipped model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.sizes = {name: len(values) + 1 for name, values in DENSE.items()}
        self.out = nn.Linear(width, sum(self.sizes.values()) + 3)

    def forward(self, features: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean error over patches, of features ``[B, N, C]``."""
        *scores, places = self.out(self.norm(features)).float().split([*self.sizes.values(), 3], dim=-1)
        empty = batch.labels["color"] == self.sizes["color"] - 1
        weight = torch.where(empty, _BACKGROUND, 1.0)
        error = torch.zeros_like(weight)
        for name, logits in zip(self.sizes, scores, strict=True):
            error = error + F.cross_entropy(logits.transpose(1, 2), batch.labels[name], reduction="none")
        error = error + F.smooth_l1_loss(places, batch.places, reduction="none").sum(-1) * ~empty
        return (error * weight).sum() / weight.sum()


def see(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """``[B, N, C]``: what the projector reads, as ``LlavaModel`` selects it; without gradients if frozen."""
    tower = model.model.vision_tower
    with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())):
        seen: torch.Tensor = tower(pixels).last_hidden_state[:, 1:]
    return seen


def answer(
    model: Any, picture: torch.Tensor | None, batch: Batch, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits ``[B, T, V]`` of the segments' tokens.

    Args:
        model: LLaVA.
        picture: ``[B, n, D]`` tokens before the segments, if any.
        batch: packed.
        bias: ``[B, n]``, added to the attention logits of the picture's tokens, whoever looks at them and in
            every layer.
    """
    embed = model.get_input_embeddings()
    rows = batch.ids.shape[0]
    begin = embed(batch.ids.new_full((rows, 1), model.config.text_config.bos_token_id))
    before = begin if picture is None else torch.cat([begin, picture.to(begin.dtype)], dim=1)
    count = before.shape[1]
    mask = _mask(batch.segments, count)
    if bias is not None:
        mask = _biased(mask, bias.to(begin.dtype))
    places = batch.stretch[:, None] * torch.arange(count - 1, device=mask.device)
    ends = 1 + batch.stretch * (count - 1)
    start = torch.zeros_like(ends)[:, None]
    positions = torch.cat([start, 1 + places, ends[:, None] + batch.positions], dim=1)
    output = model.model.language_model(
        inputs_embeds=torch.cat([before, embed(batch.ids)], dim=1),
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
    )
    return model.lm_head(output.last_hidden_state[:, count:])


def said(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """``[Q]``: the likeliest answer to every question, of logits ``[B, T, V]``."""
    row, column = batch.answers.T
    return logits[row, column].argmax(-1)


def right(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """``[Q]`` bool: whether it is the true one."""
    row, column = batch.answers.T
    return said(logits, batch) == batch.targets[row, column]


def _mask(segments: torch.Tensor, before: int) -> torch.Tensor:
    """``[B, 1, S, S]`` bool: who may look at whom."""
    rows, length = segments.shape
    total = before + length
    causal = torch.ones(total, total, dtype=torch.bool, device=segments.device).tril()
    own = torch.cat([segments.new_full((rows, before), -2), segments], dim=1)
    same = own[:, :, None] == own[:, None, :]
    same[:, :, :before] = True
    return (causal & same)[:, None]


def _biased(mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``[B, 1, S, S]`` to add to attention logits; ``bias`` ``[B, n]`` of the columns after the first."""
    columns = F.pad(bias, (1, mask.shape[-1] - 1 - bias.shape[1]))[:, None, None]
    return columns.expand_as(mask).masked_fill(~mask, torch.finfo(bias.dtype).min)


def judge(
    model: Any, head: DenseHead | None, batch: Batch, dense_weight: float, blind: bool = False
) -> Outcome:
    """Losses of a batch.

    Args:
        model: LLaVA.
        head: for the dense part, if it has weight.
        batch: packed.
        dense_weight: of the patches' part.
        blind: the language model gets no picture.
    """
    parts: dict[str, torch.Tensor] = {}
    loss = torch.zeros((), device=batch.ids.device)
    features = None if blind else see(model, batch.pixels)
    if head is not None and features is not None and dense_weight:
        parts["dense"] = head(features, batch)
        loss = loss + dense_weight * parts["dense"]
    correct = torch.zeros(0, dtype=torch.bool)
    if batch.kinds:
        picture = None if features is None else model.model.multi_modal_projector(features)
        logits = answer(model, picture, batch).float()
        parts["answers"] = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss = loss + parts["answers"]
        correct = right(logits, batch)
    return Outcome(loss, parts, correct)
