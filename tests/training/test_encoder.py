"""Encoders of many kinds: patch tokens of one layer, as the model itself gives them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import ocvtp
import ocvtp.vlm
from ocvtp.training.encoder import EncoderError, FeatureEncoder, vision_config
from ocvtp.training.features import ImageFeatures, extract
from ocvtp.training.store import FeatureStore
from ocvtp.vlm.encode.selectors import PrunerSelector
from tests.training.pictures import good_pictures, mixed_pictures, noise
from tests.vlm.processor import image_processor, write_processor
from tests.vlm.tiny_llava import llava, pruner

LAYERS, WIDTH, TOKENS = 4, 32, 16
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
WIDE = {**SIZES, "intermediate_size": 64}
TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
TEXT.update({"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2})

ENCODERS: dict[str, Callable[[], Any]] = {
    "CLIPVisionModel": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**WIDE)),
    "SiglipVisionModel": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**WIDE)),
    "Dinov2Model": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)),
    "Dinov2WithRegistersModel": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SIZES)
    ),
    "ViTModel": lambda: transformers.ViTModel(transformers.ViTConfig(**WIDE)),
    "ViTForImageClassification": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**WIDE)
    ),
    "CLIPModel": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=WIDE, text_config=TEXT, projection_dim=16)
    ),
    "SiglipModel": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=WIDE, text_config=TEXT)
    ),
}
# The class of the tower alone; transformers itself knows how to take it out of the folder.
TOWER = {
    "CLIPModel": "CLIPVisionModel",
    "SiglipModel": "SiglipVisionModel",
    "ViTForImageClassification": "ViTModel",
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of an encoder, made once."""
    base = tmp_path_factory.mktemp("encoders")

    def save(kind: str) -> Path:
        folder = base / kind
        if not folder.exists():
            torch.manual_seed(0)
            model = ENCODERS[kind]()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def folder(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A CLIP tower that a test may change."""
    return Path(shutil.copytree(saved("CLIPVisionModel"), tmp_path / "clip"))


def change_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    values.update(changes)
    (folder / "config.json").write_text(json.dumps(values))


def pictures() -> list[Image.Image]:
    return [noise(i, size) for i, size in enumerate([(60, 80), (56, 56), (90, 40)])]


@torch.no_grad()
def hidden_states(model: Any, pixels: torch.Tensor, layer: int) -> torch.Tensor:
    """The model's own, patches only."""
    return model(pixel_values=pixels, output_hidden_states=True).hidden_states[layer + 1][:, -TOKENS:]


class TestLikeTheModelItself:
    @pytest.mark.parametrize("own_processor", [True, False])
    @pytest.mark.parametrize("kind", ENCODERS)
    def test_every_kind(
        self, saved: Callable[[str], Path], tmp_path: Path, kind: str, own_processor: bool
    ) -> None:
        folder = saved(kind)
        if own_processor:
            folder = Path(shutil.copytree(folder, tmp_path / "with processor"))
            image_processor().save_pretrained(folder)
            pixels = image_processor()(images=pictures(), return_tensors="pt")["pixel_values"]
        else:
            pixels = squashed(pictures())
        model = getattr(transformers, TOWER.get(kind, kind)).from_pretrained(folder).eval()
        for layer in (0, LAYERS - 1) if own_processor else (1,):
            encoder = FeatureEncoder(str(folder), layer)
            got = encoder(pictures())
            assert got.dtype == torch.float16
            assert got.is_contiguous()
            assert not got.is_inference()  # autograd could not save it
            assert (encoder.tokens, encoder.width, encoder.layer) == (TOKENS, WIDTH, layer)
            want = hidden_states(model, pixels, layer)
            if torch.equal(got, want.half()):
                continue
            # Without a processor of its own, pixels may differ in the last bit from what is computed here.
            torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=2e-3)
        assert (encoder.note is None) == own_processor

    @pytest.mark.parametrize("tower", ["clip", "siglip"])
    def test_the_tower_of_a_llava(self, tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same pixels, the same rows as ``ocvtp.apply`` hands to the pruner; no language model loaded."""
        model = llava(tower=tower)
        model.save_pretrained(tmp_path)
        processor = write_processor(tmp_path)
        read: list[torch.Tensor] = []
        real = PrunerSelector.begin

        def begin(who: PrunerSelector, group: Any, features: torch.Tensor, *args: Any, **named: Any) -> Any:
            read.append(features)
            return real(who, group, features, *args, **named)

        monkeypatch.setattr(PrunerSelector, "begin", begin)
        ocvtp.apply(model, pruner(layer=2), keep=4)
        pixels = processor.image_processor(images=pictures(), return_tensors="pt")["pixel_values"]
        ocvtp.vlm.select(model, pixels)
        with monkeypatch.context() as patch:
            patch.setattr("transformers.LlamaModel.__init__", lambda *_: pytest.fail("the language model"))
            encoder = FeatureEncoder(str(tmp_path), 2)
        assert encoder.note is None
        got = encoder(pictures())
        # LLaVA drops the first token of every tower, SigLIP's first patch, too.
        assert torch.equal(got[:, -read[0].shape[1] :], read[0].half())
        assert got.shape[1] == TOKENS

    def test_weights_in_half_precision(self, folder: Path) -> None:
        model = transformers.CLIPVisionModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
        encoder = FeatureEncoder(str(folder), 1, dtype=torch.bfloat16)
        assert encoder.identity["dtype"] == "bfloat16"
        want = hidden_states(model, squashed(pictures()).bfloat16(), 1)
        torch.testing.assert_close(encoder(pictures()).float(), want.float(), rtol=2e-2, atol=2e-2)


def squashed(images: list[Image.Image]) -> torch.Tensor:
    """56 x 56, ImageNet's mean and spread."""
    rows = []
    for image in images:
        small = image.resize((56, 56), Image.Resampling.BICUBIC)
        values = torch.tensor(list(small.tobytes()), dtype=torch.float32).view(56, 56, 3) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        rows.append(((values - mean) / std).permute(2, 0, 1))
    return torch.stack(rows)


class TestFingerprint:
    def test_the_same_wherever_it_lies(self, folder: Path, tmp_path: Path) -> None:
        moved = shutil.copytree(folder, tmp_path / "elsewhere")
        first, second = FeatureEncoder(str(folder), 1), FeatureEncoder(f"{moved}{os.sep}", 1)
        assert first.fingerprint == second.fingerprint
        assert first.identity == json.loads(json.dumps(second.identity))
        assert str(tmp_path) not in json.dumps(first.identity)
        assert second.name == "elsewhere"

    def test_of_everything_that_features_depend_on(self, folder: Path) -> None:
        seen = [FeatureEncoder(str(folder), 1).fingerprint]

        def differs(**settings: Any) -> bool:
            seen.append(FeatureEncoder(str(folder), **{"layer": 1, **settings}).fingerprint)
            return len(set(seen)) == len(seen)

        assert differs(layer=2)
        assert differs(dtype=torch.bfloat16)
        image_processor().save_pretrained(folder)
        assert differs()
        processor = image_processor()
        processor.image_mean = [0.4, 0.4, 0.4]
        processor.save_pretrained(folder)
        assert differs()
        change_config(folder, hidden_act="gelu")
        assert differs()
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if "layers.1" in name and name.endswith("weight"))
        weights[name].view(-1)[0] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        assert differs()

    def test_not_of_a_pooler_that_is_drawn_anew(self, saved: Callable[[str], Path]) -> None:
        """A classifier's checkpoint has none: transformers makes one up, another one every time."""
        folder, seen = saved("ViTForImageClassification"), set()
        for seed in range(2):
            torch.manual_seed(seed)
            seen.add(FeatureEncoder(str(folder), 1).fingerprint)
        assert len(seen) == 1


class TestRefused:
    @pytest.mark.parametrize("layer", [-1, LAYERS, True, 1.0])
    def test_layers_that_are_not_there(
        self, folder: Path, layer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ocvtp.training.encoder._load", lambda *_: pytest.fail("loaded first"))
        with pytest.raises(EncoderError, match=f"layer must be between 0 and 3.* got {layer}"):
            FeatureEncoder(str(folder), layer)

    def test_weights_that_are_not_there(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        for name in [name for name in weights if "layers.1" in name]:
            del weights[name]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(EncoderError, match=r"lacks weights of its vision encoder, .*layers.1.* more"):
            FeatureEncoder(str(folder), 2)

    def test_truncated_weights(self, folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        with pytest.raises(EncoderError, match="can't load the weights"):
            FeatureEncoder(str(folder), 1)

    def test_weights_of_other_shapes(self, folder: Path) -> None:
        change_config(folder, hidden_size=64)
        with pytest.raises(EncoderError, match="can't load the weights"):
            FeatureEncoder(str(folder), 1)

    def test_no_encoder(self, tmp_path: Path) -> None:
        with pytest.raises(EncoderError, match="can't load the encoder"):
            vision_config(str(tmp_path))
        (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
        with pytest.raises(EncoderError, match="nonesuch"):
            vision_config(str(tmp_path))
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(EncoderError, match="can't load the encoder"):
            vision_config(str(tmp_path))

    @pytest.mark.parametrize(
        "kind",
        ["Qwen2VLConfig", "Qwen2_5_VLConfig", "LlamaConfig", "ResNetConfig", "VideoMAEConfig", "YolosConfig"],
    )
    def test_encoders_without_equal_patches(self, tmp_path: Path, kind: str) -> None:
        getattr(transformers, kind)().save_pretrained(tmp_path)
        with pytest.raises(EncoderError, match="transformers that see an image as equal patches"):
            vision_config(str(tmp_path))

    def test_an_encoder_that_merges_patches(self, tmp_path: Path) -> None:
        sizes = {"image_size": 56, "patch_size": 7, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
        transformers.SwinModel(transformers.SwinConfig(**sizes, window_size=2)).save_pretrained(tmp_path)
        with pytest.raises(EncoderError, match="can't tell which are the 2 layers of a SwinModel"):
            FeatureEncoder(str(tmp_path), 1)

    def test_an_encoder_that_leaves_patches_out(self, tmp_path: Path) -> None:
        transformers.ViTMAEModel(transformers.ViTMAEConfig(**WIDE)).save_pretrained(tmp_path)
        with pytest.raises(EncoderError, match="encoders that merge or regroup patches are not supported"):
            FeatureEncoder(str(tmp_path), 1)

    @pytest.mark.parametrize("shape", [(2, 5, 3, 56, 56), (2, 16, 588), (10, 3, 56, 56)])
    def test_processors_of_tiles_and_loose_patches(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
    ) -> None:
        monkeypatch.setattr(
            "ocvtp.training.encoder.Squash.__call__",
            lambda *_, **__: {"pixel_values": torch.zeros(shape)},
        )
        with pytest.raises(EncoderError, match=r"makes \[.*\] of 2 images, not \[2, 3, H, W\]"):
            FeatureEncoder(str(folder), 1)

    def test_a_processor_of_many_sizes(self, saved: Callable[[str], Path], tmp_path: Path) -> None:
        folder = Path(shutil.copytree(saved("Dinov2Model"), tmp_path / "dino"))
        processor = image_processor()
        processor.do_center_crop = False
        processor.save_pretrained(folder)
        with pytest.raises(EncoderError, match="it has to make one size of them"):
            FeatureEncoder(str(folder), 1)

    def test_a_processor_of_another_size(self, folder: Path) -> None:
        image_processor(28).save_pretrained(folder)
        with pytest.raises(EncoderError, match="clip can't take what its image processor makes"):
            FeatureEncoder(str(folder), 1)

    def test_more_tokens_than_before(self, saved: Callable[[str], Path], monkeypatch: Any) -> None:
        encoder = FeatureEncoder(str(saved("Dinov2Model")), 1)
        encoder._processor.size = 70
        with pytest.raises(EncoderError, match="makes 25 tokens of these images and 16 of others"):
            encoder(pictures())

    @pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
    def test_a_broken_processor_is_not_replaced(self, folder: Path, name: str) -> None:
        (folder / name).write_text('{"image_processor": ')
        with pytest.raises(EncoderError, match=r"can't load the image processor|can't be read as JSON"):
            FeatureEncoder(str(folder), 1)

    def test_a_hub_that_is_out_of_reach_is_no_missing_processor(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError("couldn't connect")

        monkeypatch.setattr("transformers.utils.cached_file", fail)
        with pytest.raises(EncoderError, match=r"can't look for the image processor .*couldn't connect"):
            FeatureEncoder(str(folder), 1)

    def test_no_processor_and_no_size(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = vision_config(str(folder))
        config.image_size = (56, 28)
        monkeypatch.setattr("ocvtp.training.encoder.vision_config", lambda _: config)
        with pytest.raises(EncoderError, match="no image_size of one number"):
            FeatureEncoder(str(folder), 1)


def test_quiet_and_as_it_was_before(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    FeatureEncoder(str(folder), 1)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_pickled_on_the_fly_and_stored(folder: Path, tmp_path: Path) -> None:
    """The real encoder, through everything: the same bits stored, fresh and pickled."""
    good_pictures(tmp_path / "images", 5)
    encoder = FeatureEncoder(str(folder), 2)
    extract(tmp_path / "images", encoder, tmp_path / "out", crops=2, batch=4)
    stored = FeatureStore(tmp_path / "out", verify=True)
    fresh = pickle.loads(pickle.dumps(ImageFeatures(tmp_path / "images", encoder, 2)))
    assert stored.fingerprint == fresh.fingerprint == FeatureEncoder(str(folder), 2).fingerprint
    for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9]):
        assert torch.equal(stored.batch(rows), fresh.batch(rows))
    assert stored.batch([0]).isfinite().all()


def test_an_encoder_beyond_float16(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.0" in name and name.endswith("fc2.bias"))
    weights[name] += 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="none of the 13 images"):
        extract(mixed_pictures(tmp_path / "images"), FeatureEncoder(str(folder), 1), tmp_path / "out")
