"""Idefics3 and SmolVLM: sizes of units, tiles that only fill up, and what upstream returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

import ocvtp
from tests.vlm.families.merged import VISION
from tests.vlm.tiny_llava import IMAGE, PAD, PLAIN, sharpen, text_config
from tests.vlm.tiny_merged import Probe, compare, ours

KINDS = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
}


def builder(kind: str, scale: int = 2, size: int = 112) -> Callable[[str], Any]:
    config, model = KINDS[kind]

    def build(attention: str = "sdpa") -> Any:
        torch.manual_seed(0)
        made = config(
            vision_config={**VISION, "image_size": size},
            text_config=text_config(),
            image_token_id=IMAGE,
            scale_factor=scale,
            pad_token_id=PAD,
            attn_implementation=attention,
        )
        return sharpen(model(made))

    return build


def tiles(*shape: int, size: int = 112) -> torch.Tensor:
    return torch.randn(*shape, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "size"), [(2, 112), (4, 112), (1, 112), (3, 12 * 14 + 6)])
def test_units(kind: str, scale: int, size: int) -> None:
    compare(builder(kind, scale, size), "vision_model", tiles(1, 2, size=size), scale)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_that_fill_up_are_left_out(kind: str) -> None:
    model, pixels = builder(kind)("sdpa"), tiles(2, 3)
    pixels[0, 1:] = 0
    pixels[1, 2] = 0
    indices = torch.tensor([[0, 3, 9], [1, 2, 15], [4, 5, 6]])
    got = ours(model, pixels, Probe(2, 2, indices))
    every = model.model.get_image_features(pixels, return_dict=True).pooler_output
    every = every if isinstance(every, torch.Tensor) else torch.cat(list(every))
    rows = every.reshape(3, 16, -1).gather(1, indices[:, :, None].expand(-1, -1, every.shape[-1]))
    torch.testing.assert_close(got.rows, rows, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_pixels(kind: str) -> None:
    """A mask that covers real tiles whole says nothing; one that doesn't is refused."""
    model, pixels = builder(kind)("sdpa"), tiles(1, 2)
    pixels[0, 1] = 0
    mask = torch.zeros(1, 2, 112, 112, dtype=torch.long)
    mask[0, 0] = 1
    row = {"input_ids": torch.tensor([[1, *[IMAGE] * 16, 7]]), "pixel_values": pixels}
    ocvtp.apply(model, "grid", keep=4, **PLAIN)
    want = model(**row).logits
    assert torch.equal(model(**row, pixel_attention_mask=mask).logits, want)
    mask[0, 0, 100:] = 0
    with pytest.raises(ValueError, match="marks padding inside a tile"):
        model(**row, pixel_attention_mask=mask)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_without_a_picture_are_refused(kind: str) -> None:
    model = builder(kind)("sdpa")
    ocvtp.apply(model, "grid", keep=4, **PLAIN)
    row = {"input_ids": torch.tensor([[1, 21, 22]]), "pixel_values": torch.zeros(1, 1, 3, 112, 112)}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="nothing but tiles of zeros"):
            call(**row)
