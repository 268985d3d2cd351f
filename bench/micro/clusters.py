"""Features as images have them: tokens around as many centres as are kept."""

from __future__ import annotations

import torch


def clustered(generator: torch.Generator, batch: int, tokens: int, width: int, keep: int) -> torch.Tensor:
    """``[batch, tokens, width]`` float32 around ``keep`` centres, on the generator's device."""
    device = generator.device
    centres = torch.randn(batch, keep, width, generator=generator, device=device)
    noise = torch.randn(batch, tokens, width, generator=generator, device=device)
    near = torch.randint(keep, (batch, tokens), generator=generator, device=device)
    return centres.gather(1, near[:, :, None].expand_as(noise)) + 0.5 * noise


def some_tokens(generator: torch.Generator, batch: int, tokens: int, keep: int) -> torch.Tensor:
    """``[batch, keep]`` int64, any tokens of each image, ascending."""
    order = torch.rand(batch, tokens, generator=generator, device=generator.device).argsort(dim=1)
    return order[:, :keep].sort(dim=1).values
