"""Qwen-VL: kept tokens keep their row and column, and text goes on where it would have.

vLLM numbers a prompt before it has seen the image, and asks again when the encoder has run
(``recompute_mrope_positions``, made for pruned videos). What was kept travels with the rows, in columns of
their own: row and column of each and the image's longer side, in digits of base 128, which bfloat16 holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ocvtp.serving.vllm.errors import ServingError
from ocvtp.vlm.contracts.rows import KeptRows

_BASE = 128
#: On the positions of a prompt: where text goes on behind it.
_BEHIND = "_ocvtp_behind"
_COLUMNS = 6  # row, column, and the longer side of the image: a high and a low digit each


class Positions:
    """Mixin before :class:`ocvtp.serving.vllm.model.Pruned`."""

    supports_multimodal_pruning = True
    supported_video_pruning_methods = ("evs",)
    config: Any
    plan: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ServingError(
                "ocvtp: where kept tokens of Qwen-VL are is known in the first pipeline stage alone, and "
                "later ones would go on with other positions: use --tensor-parallel-size instead"
            )
        # The runner asks for positions if videos are pruned at all; no frame is at this rate, and there are
        # no videos.
        vllm_config.model_config.multimodal_config.video_pruning_rate = 1e-17
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]

    def _postprocess_image_embeds_evs(self, rows: Any, image_input: Any) -> Any:
        return rows  # they have their columns already

    def handed_over(self, kept: KeptRows, part: Any) -> list[torch.Tensor]:
        """Rows with DeepStack features beside them, as vLLM has them, and their columns."""
        rows = [torch.cat(levels, dim=1) for levels in zip(kept.rows, *kept.deep, strict=True)]
        slots = kept.slots.split([len(one) for one in rows])
        return self.with_columns(rows, slots, part["image_grid_thw"])

    def whole(self, rows: Any, image_input: Any) -> Any:
        """Rows that the caller made: all of their image."""
        rows = list(rows)
        slots = [torch.arange(len(one), device=one.device) for one in rows]
        return self.with_columns(rows, slots, image_input["image_grid_thw"])

    def with_columns(
        self, rows: Sequence[torch.Tensor], slots: Sequence[torch.Tensor], grids: torch.Tensor
    ) -> list[torch.Tensor]:
        """``[k, D] -> [k, D + 6]``: where in its image each row is."""
        merge = self.plan.layout.unit
        made = []
        for one, slot, (_, height, width) in zip(rows, slots, grids.tolist(), strict=True):
            height, width = height // merge, width // merge
            row, column = torch.div(slot, width, rounding_mode="floor"), slot % width
            numbers = torch.stack([row, column, torch.full_like(row, max(height, width))], dim=1)
            digits = torch.stack([torch.div(numbers, _BASE, rounding_mode="floor"), numbers % _BASE], dim=2)
            made.append(torch.cat([one, digits.flatten(1).to(one)], dim=1))
        return made

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[torch.Tensor, int]:
        """Text where it belongs, whatever is kept; images begin where they do, to be filled in later."""
        merge = self.plan.layout.unit
        columns, done, number = [], 0, 0
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            offset, length = feature.mm_position.offset, feature.mm_position.length
            _, height, width = (int(x) for x in feature.data["image_grid_thw"].data)
            columns.append(torch.arange(number, number + offset - done))
            number += offset - done
            columns.append(torch.full((length,), number))
            number += max(height, width) // merge
            done = offset + length
        left = len(input_tokens) - done
        columns.append(torch.arange(number, number + left))
        positions = torch.cat(columns).expand(3, -1).contiguous()
        setattr(positions, _BEHIND, number + left)
        return positions, number + left - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor, int]:
        """Rows without their columns, and rows and columns added to where their image begins.

        The temporal position of an image's token is where the image begins: its own first dimension, which
        nothing here changes. So the same call over again makes the same of it.
        """
        length = mrope_positions.shape[1]
        if not multimodal_embeddings:  # asked at every step, while text is decoded too
            behind = getattr(mrope_positions, _BEHIND, None)
            if behind is None:
                behind = int(mrope_positions[0, -1]) + 1
            return multimodal_embeddings, mrope_positions, behind - length
        rows = [one[:, :-_COLUMNS] for one in multimodal_embeddings]
        positions = mrope_positions.clone()
        behind = int(positions[0, -1]) + 1  # of a text token, which was right from the start
        digits = torch.cat([one[:, -_COLUMNS:] for one in multimodal_embeddings]).round().long()
        row, column, side = (digits[:, ::2] * _BASE + digits[:, 1::2]).to(positions.device).unbind(1)
        ids = torch.as_tensor(input_ids, device=positions.device)
        image = (ids == self.config.image_token_id).nonzero()[:, 0]
        at = image[image >= num_computed_tokens][: len(row)]
        positions[1, at] = positions[0, at] + row
        positions[2, at] = positions[0, at] + column
        if int(at[-1]) == length - 1:  # a prompt that ends in an image
            behind = int(positions[0, -1] + side[-1])
        return rows, positions, behind - length
