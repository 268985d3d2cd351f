"""Gemma 3: units that are averages of patches, and images that attend both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

import ocvtp
from tests.vlm.families.merged import FAMILIES, TEXT, VISION
from tests.vlm.skips import NATIVE_ROUTE, needs_mm_route
from tests.vlm.tiny_llava import GREEDY, IMAGE, PLAIN, sharpen
from tests.vlm.tiny_merged import compare, first_mask

FAMILY = next(family for family in FAMILIES if family.name == "gemma3")


def builder(tokens: int = 16, window: int = 8) -> Callable[..., Any]:
    def build(attention: str = "sdpa") -> Any:
        torch.manual_seed(0)
        text = Gemma3TextConfig(
            **TEXT,
            query_pre_attn_scalar=12,
            sliding_window=window,
            layer_types=["full_attention", "sliding_attention"],
        )
        config = Gemma3Config(
            vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
            text_config=text,
            mm_tokens_per_image=tokens,
            image_token_index=IMAGE,
            boi_token_index=122,
            eoi_token_index=123,
            attn_implementation=attention,
        )
        model = sharpen(Gemma3ForConditionalGeneration(config))
        with torch.no_grad():  # zero unless loaded
            model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.2)
            model.model.multi_modal_projector.mm_soft_emb_norm.weight.normal_(std=0.2)
        return model

    return build


def test_older_releases_are_refused() -> None:
    """They take features as embeddings only, which ``generate`` of this family doesn't."""
    if NATIVE_ROUTE == "mm_encoder_outputs":
        pytest.skip("this transformers hands features over")
    with pytest.raises(ValueError, match=r"pruning gemma3 needs transformers >= 5\.18"):
        ocvtp.apply(builder()(), "grid", keep=5)


@pytest.mark.parametrize(("tokens", "unit"), [(64, 1), (16, 2), (4, 4)])
def test_units(tokens: int, unit: int) -> None:
    needs_mm_route()
    pixels = torch.randn(3, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    compare(builder(tokens), "vision_tower", pixels, unit)


@pytest.mark.parametrize("generating", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kept", [1, 5, 16])
def test_each_image_attends_to_itself_both_ways(kept: int, side: str, generating: bool) -> None:
    """Whatever is left of it, and in sliding layers as if it had never had more tokens."""
    needs_mm_route()
    if generating and side == "right":
        pytest.skip("generate wants padding on the left")
    model = builder(window=8)("eager")
    batch = FAMILY.batch(side=side)
    short = [_without(row["input_ids"][0].tolist(), 16 - kept) for row in FAMILY.rows().values()]
    options = GREEDY if generating else {}
    for layer in (0, 1):
        alone = []
        for ids in short:
            given = torch.tensor([ids])
            alone.append(
                first_mask(
                    model,
                    layer,
                    {"input_ids": given, "token_type_ids": (given == IMAGE).long()},
                    **options,
                )[0, 0]
            )
        ocvtp.apply(model, "grid", keep=kept, **PLAIN)
        mask = first_mask(model, layer, batch, **options)
        ocvtp.remove(model)
        width = mask.shape[-1]
        assert width == max(map(len, short))
        for row, ids, unpatched in zip(mask[:, 0], short, alone, strict=True):
            start = width - len(ids) if side == "left" else 0
            live = slice(start, start + len(ids))
            assert torch.equal(row[live, live], unpatched)
            if layer == 0:
                where, image = torch.arange(len(ids)), _numbered(ids)
                together = (image[:, None] == image[None]) & (image[None] >= 0)
                assert torch.equal(unpatched, (where[:, None] >= where[None]) | together)
            outside = row[live].clone()
            outside[:, live] = False
            assert not outside.any()


def _without(ids: list[int], fewer: int) -> list[int]:
    """A prompt with so many placeholders less in each run."""
    out: list[int] = []
    run = 0
    for token in ids:
        run = run + 1 if token == IMAGE else 0
        if run == 0 or run > fewer:
            out.append(token)
    return out


def _numbered(ids: list[int]) -> torch.Tensor:
    """Which image each token is of, or -1."""
    numbers, image = [], -1
    for i, token in enumerate(ids):
        if token == IMAGE and (i == 0 or ids[i - 1] != IMAGE):
            image += 1
        numbers.append(image if token == IMAGE else -1)
    return torch.tensor(numbers)
