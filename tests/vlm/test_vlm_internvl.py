"""InternVL: the towers that its checkpoints have, and layers that may be consumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

import ocvtp
from tests.vlm.families.merged import SIDE, VISION
from tests.vlm.tiny_llava import IMAGE, LAYERS, PLAIN, sharpen, text_config
from tests.vlm.tiny_merged import compare

PIXELS = torch.randn(3, 3, SIDE * 14, SIDE * 14, generator=torch.Generator().manual_seed(0))


def internvl(
    attention: str = "sdpa", ratio: float = 0.5, layer: int = -1, **vision: Any
) -> InternVLForConditionalGeneration:
    square = {"image_size": [SIDE * 14] * 2, "patch_size": [14, 14]}
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**{**VISION, **square, **vision}),
        text_config=text_config(),
        image_token_id=IMAGE,
        image_seq_length=int((SIDE * ratio) ** 2),
        downsample_ratio=ratio,
        vision_feature_layer=layer,
        attn_implementation=attention,
    )
    model = sharpen(InternVLForConditionalGeneration(config))
    with torch.no_grad():  # zeros and ones unless loaded
        for name, parameter in model.model.vision_tower.named_parameters():
            if parameter.ndim == 1 or "position" in name or "cls" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize(
    "vision",
    [
        pytest.param({"attention_bias": True, "layer_scale_init_value": 0.1}, id="300M"),
        pytest.param({"use_qk_norm": True, "norm_type": "rms_norm"}, id="6B"),
        pytest.param({"use_mean_pooling": False}, id="final-norm"),
        pytest.param({"use_absolute_position_embeddings": False}, id="no-positions"),
    ],
)
def test_towers(vision: dict[str, Any]) -> None:
    compare(lambda attention: internvl(attention, **vision), "vision_tower", PIXELS, 2)


@pytest.mark.parametrize(("ratio", "unit"), [(0.5, 2), (0.25, 4), (1.0, 1)])
def test_units(ratio: float, unit: int) -> None:
    compare(lambda attention: internvl(attention, ratio), "vision_tower", PIXELS, unit)


@pytest.mark.parametrize("layer", [-1, -2, LAYERS, LAYERS - 1])
def test_consumed_layers(layer: int) -> None:
    """The last layer's output has the final norm where it is asked for as ``-1`` only."""
    scored = layer if layer < 0 else layer - 1
    compare(
        lambda attention: internvl(attention, layer=layer, use_mean_pooling=False),
        "vision_tower",
        PIXELS,
        2,
        scored=scored,
    )


@pytest.mark.parametrize("layer", [0, LAYERS + 1, -LAYERS - 1])
def test_layers_that_are_not_there(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"vision_feature_layer={layer} must be"):
        ocvtp.apply(internvl(layer=layer), "grid", keep=4)


def test_pictures_of_another_size_are_refused() -> None:
    model = internvl()
    ocvtp.apply(model, "grid", keep=4, **PLAIN)
    ids = torch.tensor([[1, *[IMAGE] * 16, 7]])
    with pytest.raises(ValueError, match="not pictures of 8 x 8 patches"):
        model(input_ids=ids, pixel_values=torch.randn(1, 3, SIDE * 14, SIDE * 28))
