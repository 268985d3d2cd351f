"""Gemma 3 and PaliGemma: a SigLIP tower, pooled or not, and a linear projector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ocvtp.vlm.families.merged import MergedFamily


class PaliGemmaAdapter(MergedFamily):
    """Tower -> choice per image -> projector on the kept tokens."""

    first_position = 1
    needs_mm_route = True  # its generate takes no embeddings
    masks_by_layer = False

    def check_call(self, arguments: Mapping[str, Any], *, generating: bool) -> None:
        """Raise ``ValueError`` for an image behind a cache in ``forward``.

        Behind one, upstream lets new tokens attend both ways only if it sees pixels, and it sees none.
        """
        used = getattr(arguments.get("past_key_values"), "is_initialized", False)
        if used and not generating and arguments.get("token_type_ids") is not None:
            raise ValueError(
                "an image behind a cache can't be pruned with token_type_ids: pass the whole prompt with an "
                "empty cache"
            )

    def check_packed(self, arguments: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` without types: upstream, they say what is causal where there is no mask."""
        if arguments.get("token_type_ids") is None:
            raise ValueError(
                "several documents in one row need token_type_ids with this model: pass those that its "
                "processor made"
            )

    def project_all(self, patches: torch.Tensor) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        rows: torch.Tensor = self.model.model.multi_modal_projector(patches)
        return rows

    def project(self, units: torch.Tensor) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        return self.project_all(units.flatten(2))


class Gemma3Adapter(MergedFamily):
    """Tower -> choice per image (a crop of pan and scan is one) -> pooling and projector -> kept tokens.

    Tokens are averages of patches. The projector pools whole pictures only, so it runs on all of them (a
    two-thousandth of the tower's work) and the kept tokens are taken from what it makes.
    """

    needs_mm_route = True  # its generate takes no embeddings
    projects_tokens = False

    def project_all(self, patches: torch.Tensor) -> torch.Tensor:
        """See :class:`~ocvtp.vlm.families.merged.MergedFamily`."""
        rows: torch.Tensor = self.model.model.multi_modal_projector(patches)
        return rows
