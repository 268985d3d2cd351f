"""Clusters by density peaks (Rodriguez and Laio, Science 2014; Du et al., Knowl.-Based Syst. 2016)."""

from __future__ import annotations

import math

import torch


def density_peaks(x: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres that are dense and far from anything denser, and the means of what is nearest to each.

    A token's density is ``exp(-mean of the squared distances to its `clusters` nearest, itself among them)``.
    Mutual neighbours are equally dense, always so where there are two clusters. SparseVLM's code then lets a
    random number decide; here the first counts as the denser, so tokens come by descending score.

    Args:
        x: ``[B, m, D]`` floating point; computes in at least float32.
        clusters: ``1 <= clusters <= m``.

    Returns:
        ``[B, clusters]`` int64 centres and ``[B, clusters, D]`` means, in their order.
    """
    batch, tokens, width = x.shape
    if not 1 <= clusters <= tokens:
        raise ValueError(f"clusters must be between 1 and {tokens}, the tokens; got {clusters}")
    x = x if x.dtype == torch.float64 else x.float()
    # Of close tokens, distances by a product of matrices are rounding alone.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(width)
    near = distance.topk(clusters, dim=2, largest=False).values
    density = near.square().mean(2).neg().exp()
    rank = torch.arange(tokens, device=x.device)
    mine, other = density[:, :, None], density[:, None, :]
    denser = (other > mine) | ((other == mine) & (rank[None, :] < rank[:, None]))
    apart = distance.masked_fill(~denser, float("inf")).amin(2)
    apart = torch.where(denser.any(2), apart, distance.amax((1, 2))[:, None])
    centres = (apart * density).sort(dim=1, descending=True, stable=True).indices[:, :clusters]
    nearest = distance.gather(2, centres[:, None].expand(-1, tokens, -1)).argmin(2)
    nearest = nearest.scatter(1, centres, rank[:clusters].expand(batch, -1))
    members = torch.nn.functional.one_hot(nearest, clusters).to(x.dtype).transpose(1, 2)
    return centres, (members @ x) / members.sum(2, keepdim=True)
