"""Gemma 3 and PaliGemma: a SigLIP tower, pooled or not, and a linear projector."""

from __future__ import annotations

import math

import torch

from ocvtp.vlm.merged import MergedFamily


class PaliGemmaAdapter(MergedFamily):
    """Tower -> choice per image -> projector on the kept tokens."""

    first_position = 1
    needs_mm_route = True  # its generate takes no embeddings

    def project_all(self, patches: torch.Tensor) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.merged.MergedFamily`."""
        rows: torch.Tensor = self.model.model.multi_modal_projector(patches)
        if hasattr(self.model.get_input_embeddings(), "embed_scale"):
            return rows
        # Releases whose language model scales embeddings, features among them, undo it beforehand.
        return rows / (self.model.config.text_config.hidden_size**0.5)

    def project(self, units: torch.Tensor) -> torch.Tensor | None:
        """See :class:`~ocvtp.vlm.merged.MergedFamily`."""
        return self.project_all(units.flatten(2))


class Gemma3Adapter(MergedFamily):
    """Tower -> choice per image (a crop of pan and scan is one) -> pooling and projector -> kept tokens.

    Tokens are averages of patches. The projector pools whole pictures only, so it runs on all of them (a
    two-thousandth of the tower's work) and the kept tokens are taken from what it makes.
    """

    needs_mm_route = True  # its generate takes no embeddings

    @property
    def unit(self) -> int:
        """See :class:`~ocvtp.vlm.merged.MergedFamily`."""
        return self.side // math.isqrt(int(self.model.config.mm_tokens_per_image))

    def project_all(self, patches: torch.Tensor) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.merged.MergedFamily`."""
        rows: torch.Tensor = self.model.model.multi_modal_projector(patches)
        return rows
