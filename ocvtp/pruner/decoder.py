"""The reconstruction decoder: rebuilds all encoder tokens from slots. Training only."""

from __future__ import annotations

import torch
from torch import nn

from ocvtp.pruner.config import PrunerConfig
from ocvtp_kernels._checks import require_shape


class ReconstructionDecoder(nn.Module):
    """Masked transformer decoder of OC-VTP (official class ``ARRandTransformerDecoder``).

    Queries are the projected tokens, hidden ones replaced by a learned token, plus a learned position;
    memory is the projected slots. Self-attention is full, so the official random permutation of tokens
    changes nothing but which of them are hidden; that is the ``mask`` here.
    """

    def __init__(self, config: PrunerConfig) -> None:
        super().__init__()
        width = config.in_dim
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.position = nn.Parameter(
            torch.nn.init.trunc_normal_(torch.empty(1, config.decoder_tokens, width))
        )
        self.token_proj = nn.Linear(width, width, bias=False)
        self.token_norm = nn.LayerNorm(width)
        self.slot_proj = nn.Linear(config.slot_dim, width, bias=False)
        self.slot_norm = nn.LayerNorm(width)
        self.input_norm = nn.LayerNorm(width, bias=False)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width,
                config.decoder_heads,
                config.decoder_ffn_dim,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
                bias=False,
            )
            for _ in range(config.decoder_layers)
        )
        # The residual stream itself is normalised once, so the first layer must not do it again.
        self.layers[0].norm1 = nn.Identity()

    def forward(
        self, features: torch.Tensor, slots: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Reconstruct ``features``.

        Args:
            features: ``[B, N, C]``; ``N`` must be the ``decoder_tokens`` of the config.
            slots: ``[B, K, D]``.
            mask: ``[B or 1, N]`` bool, True where a token is hidden from the decoder; ``None`` hides none.

        Returns:
            ``[B, N, C]``.

        Raises:
            TypeError, ValueError: see :meth:`check`.
        """
        self.check(features, mask)
        tokens = self.token_norm(self.token_proj(features))
        if mask is not None:
            tokens = torch.where(mask[:, :, None], self.mask_token, tokens)
        hidden = self.input_norm(tokens + self.position)
        memory = self.slot_norm(self.slot_proj(slots))
        for layer in self.layers:
            hidden = layer(hidden, memory)
        return hidden

    def check(self, features: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Refuse what :meth:`forward` could not use, before anything is computed.

        Raises:
            TypeError: a mask that is not bool.
            ValueError: another number of tokens than the decoder was made for, or a mask of another shape.
        """
        batch, tokens, _ = features.shape
        if tokens != self.position.shape[1]:
            raise ValueError(
                f"this decoder has positions for {self.position.shape[1]} tokens per image; got {tokens}"
            )
        if mask is None:
            return
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool; got {getattr(mask, 'dtype', type(mask).__name__)}")
        require_shape("mask", mask, (None, tokens), "[B or 1, N]")
        if mask.shape[0] not in (1, batch):
            raise ValueError(f"mask must have batch size 1 or {batch}; got {mask.shape[0]}")
