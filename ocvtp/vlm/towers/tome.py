"""Runs a CLIP tower that merges tokens in every block: ToMe (arXiv 2210.09461), section 3.

A loop of its own, since tokens become fewer between attention and MLP. It calls the tower's own submodules;
attention is PyTorch's ``scaled_dot_product_attention`` whatever the tower was told to use, for the sizes of
merged tokens are added to its logits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from ocvtp.methods.tome import carry, match, merge, raster
from ocvtp.vlm.contracts.evidence import Merged
from ocvtp.vlm.contracts.weights import inside
from ocvtp.vlm.towers.clip import embedded, root
from ocvtp_kernels.selection import gather_tokens


def run_merging_tower(
    tower: Any, pixel_values: torch.Tensor, removed: Sequence[int], *, proportional: bool = True
) -> Merged:
    """Run as many blocks as ``removed`` has numbers, merging so many tokens in each.

    Args:
        tower: ``CLIPVisionModel``, whose first token is a class token.
        pixel_values: ``[B, 3, H, W]``.
        removed: tokens to merge away in each block.
        proportional: whether a merged token counts in attention as many as it is made of.

    Returns:
        Rows are differentiable in the pixels and the tower's parameters; who merges has no gradient.
    """
    body = root(tower)
    hidden = embedded(body, pixel_values)
    batch, tokens, _ = hidden.shape
    size = torch.ones(batch, tokens, 1, dtype=torch.float32, device=hidden.device)
    owner = torch.arange(tokens, device=hidden.device).repeat(batch, 1)
    for layer, count in zip(itertools.islice(body.encoder.layers, len(removed)), removed, strict=True):
        whole = not proportional or hidden.shape[1] == tokens
        block = functools.partial(_block, layer, count, None if whole else size.log())
        hidden, size, owner = inside((layer, layer.self_attn), block, hidden, size, owner)
    order = raster(owner, hidden.shape[1])
    rank = torch.full_like(owner[:, : hidden.shape[1]], -1).scatter(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    rows, sizes = gather_tokens(hidden, order), size.gather(1, order[:, :, None])[:, :, 0]
    return Merged(rows, rank.gather(1, owner[:, 1:]), sizes)


def _block(
    layer: Any,
    count: int,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    size: torch.Tensor,
    owner: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention, one step of merging, MLP."""
    attention = layer.self_attn
    x = layer.layer_norm1(hidden)
    heads = (attention.num_heads, -1)
    query, key, value = (
        project(x).unflatten(-1, heads).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    added = None if bias is None else bias.to(query)[:, None].transpose(2, 3)  # [B, 1, 1, tokens]
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=added, scale=attention.scale
    )
    hidden = hidden + attention.out_proj(attended.transpose(1, 2).flatten(2))
    wide = torch.promote_types(key.dtype, torch.float32)
    pairs = match(key.detach().to(wide).mean(1), count, class_token=True)
    hidden, size = merge(hidden, size, pairs)
    return hidden + layer.mlp(layer.layer_norm2(hidden)), size, carry(owner, pairs)
