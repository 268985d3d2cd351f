"""Features of every family, as ``ocvtp.apply`` reads them, and a pruner trained on them that it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForImageTextToText

import ocvtp
from ocvtp.training.encoder import EncoderError, FeatureEncoder
from ocvtp.training.features import ImageFeatures
from ocvtp.training.pictures import PictureEncoder, is_pruned_family
from ocvtp.training.recipe import Recipe
from ocvtp.training.trainer import default_config, train
from ocvtp.vlm.encode.selectors import PrunerSelector
from ocvtp.vlm.families import adapter_for
from ocvtp.vlm.layouts.qwen_geometry import patchify
from tests.vlm import tiny_qwen
from tests.vlm.family import Family, families
from tests.vlm.hub_families import FAMILIES as HUB
from tests.vlm.hub_folders import write_folder
from tests.vlm.skips import VERSION

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
SIDE = 112  # of pictures for Qwen-VL: 4 x 4 units
LAYER = 2
CASES = [pytest.param(family, id=family.name) for family in families() if family.name != "llava"]


def saved(family: Family, folder: Path) -> Any:
    model = family.model()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return model


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def pixels(image: Image.Image, side: int) -> torch.Tensor:
    square = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    normal = (square - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
    return torch.from_numpy(normal).permute(2, 0, 1)[None]


def inputs_of(family: Family, square: torch.Tensor) -> dict[str, Any]:
    """The picture as the model's arguments, seen whole."""
    if family.name.startswith("qwen"):
        side = square.shape[-1] // tiny_qwen.PATCH
        return {
            "pixel_values": patchify(square, tiny_qwen.PATCH, tiny_qwen.MERGE, 2),
            "image_grid_thw": torch.tensor([[1, side, side]]),
        }
    if family.name in ("idefics3", "smolvlm"):
        return {"pixel_values": square[None]}
    if family.name in ("llava_next", "llava_onevision"):  # the whole picture is the first of the tiles
        tiles = torch.cat([square, torch.zeros(2, *square.shape[1:])])
        return {"pixel_values": tiles[None], "image_sizes": torch.tensor([[56, 100]])}
    return {"pixel_values": square}


@pytest.mark.parametrize("family", CASES)
def test_what_apply_hands_to_the_pruner(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, image = saved(family, tmp_path), picture(1)
    assert is_pruned_family(str(tmp_path))
    encoder = PictureEncoder(str(tmp_path), LAYER, side=SIDE if "qwen" in family.name else None)
    assert encoder.note is None
    assert (encoder.layer, encoder.width, encoder.unit) == (LAYER, family.width, family.unit)
    got = encoder([image, picture(2)])
    assert got.shape == (2, encoder.tokens, encoder.width)
    side = SIDE if "qwen" in family.name else encoder._adapter.picture_side
    read: list[torch.Tensor] = []
    real = PrunerSelector.begin

    def begin(who: PrunerSelector, group: Any, features: torch.Tensor, *args: Any, **named: Any) -> Any:
        read.append(features)
        return real(who, group, features, *args, **named)

    monkeypatch.setattr(PrunerSelector, "begin", begin)
    ocvtp.apply(model, family.pruner(layer=LAYER), keep=2)
    given = inputs_of(family, pixels(image, int(side or SIDE)))
    ocvtp.vlm.select(model, given.pop("pixel_values"), **given)
    torch.testing.assert_close(got[0].float(), read[0][0, : encoder.tokens], rtol=2e-3, atol=2e-3)
    assert not torch.equal(got[0], got[1])


@pytest.mark.parametrize("family", CASES)
def test_a_pruner_trained_on_them_fits(family: Family, tmp_path: Path) -> None:
    model = saved(family, tmp_path / "model")
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(12):
        picture(i).save(photos / f"{i}.png")
    side = SIDE if "qwen" in family.name else None
    encoder = PictureEncoder(str(tmp_path / "model"), LAYER, side=side)
    source = ImageFeatures(photos, encoder)
    assert source.unit == family.unit
    recipe = Recipe(epochs=1, batch_size=4, slots=(2, 4), warmup_epochs=0, validation_share=0.3)
    config = default_config(source, decoder_layers=1, hidden_dim=32, ffn_dim=32, decoder_ffn_dim=32)
    assert config.unit == family.unit
    trained = train(source, tmp_path / "run", recipe, config, device=torch.device("cpu"))
    pruner = ocvtp.OCPruner.from_pretrained(trained.pruner)
    assert pruner.config.unit == family.unit
    assert "layer 2" in str(ocvtp.apply(model, pruner, keep=2))
    row = family.rows()["one"]
    assert model.generate(**row, max_new_tokens=2, do_sample=False).shape[1] == row["input_ids"].shape[1] + 2


def test_patches_are_ordered_as_by_the_image_processor() -> None:
    import transformers

    kind = getattr(transformers, "Qwen2VLImageProcessorPil", None)
    if kind is None:
        pytest.skip("the image processor of this transformers needs torchvision")
    processor = kind(image_mean=MEAN, image_std=STD, min_pixels=SIDE**2, max_pixels=SIDE**2)
    image = picture(3, (SIDE, SIDE))
    made = processor(images=[image], return_tensors="pt")
    got = patchify(pixels(image, SIDE), 14, 2, 2)
    torch.testing.assert_close(got, made["pixel_values"], atol=1e-5, rtol=1e-5)
    assert made["image_grid_thw"].tolist() == [[1, SIDE // 14, SIDE // 14]]


def test_mistakes(tmp_path: Path) -> None:
    qwen = next(family for family in families() if family.name.startswith("qwen"))
    saved(qwen, tmp_path)
    with pytest.raises(EncoderError, match="between 0 and 5"):
        PictureEncoder(str(tmp_path), 6)
    with pytest.raises(EncoderError, match="no whole units of 28"):
        PictureEncoder(str(tmp_path), LAYER, side=100)
    with pytest.raises(EncoderError, match="no such folder"):
        is_pruned_family(str(tmp_path / "nothing"))
    with pytest.raises(EncoderError):  # what sees any size can't be read as an encoder of one
        FeatureEncoder(str(tmp_path), LAYER)
    (tmp_path / "preprocessor_config.json").unlink()
    note = PictureEncoder(str(tmp_path), LAYER, side=SIDE).note
    assert note is not None
    assert "ImageNet" in note


@pytest.mark.parametrize("name", sorted(HUB))
def test_published_key_names(name: str, tmp_path: Path) -> None:
    """Folders laid out as on the Hub: old prefixes, shards, a language model that is left alone."""
    if Version(HUB[name].since) > VERSION:
        pytest.skip(f"needs transformers >= {HUB[name].since}")
    folder = write_folder(tmp_path, name)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    if not is_pruned_family(str(folder)):
        assert model.config.model_type == "llava"
        return
    encoder = PictureEncoder(str(folder), 1, side=2 * SIDE if "Qwen" in name else None)
    pictures = torch.randn(1, 3, encoder._side, encoder._side, generator=torch.Generator().manual_seed(0))
    want = adapter_for(model).picture_features(pictures, 1)
    assert torch.equal(encoder._adapter.picture_features(pictures, 1), want)
