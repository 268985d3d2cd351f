"""Folders laid out as the hub repositories are load, and the patch goes on what was loaded."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

import ocvtp
from ocvtp import OCPruner, PrunerConfig
from ocvtp.vlm.families import ADAPTERS
from tests.vlm.hub_families import FAMILIES, Family
from tests.vlm.hub_folders import random_model, write_folder
from tests.vlm.skips import VERSION

NAMES = list(FAMILIES)
TORCHVISION = importlib.util.find_spec("torchvision") is not None
NEW = 5
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
#: What ``get_image_features`` takes, of what a processor returns.
IMAGE_KEYS = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def family(name: str) -> Family:
    return FAMILIES[name]


@pytest.fixture
def folder(root: Path, name: str) -> Path:
    return root / name if (root / name).exists() else write_folder(root, name)


def load(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, **options)


def processor_of(folder: Path, family: Family) -> Any:
    """The folder's processor, or None where it needs a torchvision that is not there."""
    if not TORCHVISION and (family.video or Version(family.pillow) > VERSION):
        return None
    return transformers.AutoProcessor.from_pretrained(folder)


def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    return Image.fromarray(values)


def question(family: Family) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": picture()}, {"type": "text", "text": family.prompt}]
    return [{"role": "user", "content": parts}]


def processed(processor: Any, family: Family) -> dict[str, torch.Tensor]:
    """A question about a picture, as a user would have it processed."""
    if not family.chat:
        inputs = processor(images=picture(), text=family.prompt, return_tensors="pt")
    else:
        inputs = processor.apply_chat_template(
            question(family),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    return {key: value for key, value in inputs.items() if key != "labels"}  # PaliGemma's adds them


def put_together(folder: Path, family: Family, model: Any) -> dict[str, torch.Tensor]:
    """The same without a processor: its parts, and as many placeholders as the model makes features."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    if Version(family.pillow) > VERSION:
        pytest.skip("its image processor needs torchvision")
    inputs = dict(AutoImageProcessor.from_pretrained(folder)(picture(), return_tensors="pt"))
    inputs.pop("num_patches", None)  # InternVL's, for its processor
    count = len(features_of(model, inputs))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        question(family), chat_template=family.chat, add_generation_prompt=True, tokenize=False
    )
    text = text.replace(family.image, family.image * count)
    inputs |= tokenizer(text, add_special_tokens=False, return_tensors="pt")
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == image_token_of(model)).long()
    return inputs


def features_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """``[rows, D]`` features the model makes of the picture; each version returns them its own way."""
    with torch.no_grad():
        out = model.get_image_features(**{key: inputs[key] for key in IMAGE_KEYS if key in inputs})
    found = getattr(out, "pooler_output", out)
    while isinstance(found, (tuple, list)) and not isinstance(found[0], torch.Tensor):
        found = found[0]  # Qwen3-VL's come with those of DeepStack
    rows = [found] if isinstance(found, torch.Tensor) else list(found)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in rows])


def image_token_of(model: Any) -> int:
    return model.config.image_token_id


def make_pruner(family: Family) -> OCPruner:
    torch.manual_seed(0)
    sizes = {"in_dim": family.width, "hidden_dim": 48, "slot_dim": 16, "ffn_dim": 32, "layer": 0}
    return OCPruner(PrunerConfig(**sizes, unit=family.unit)).eval()


def apply_and_generate(
    folder: Path, family: Family, inputs: dict[str, torch.Tensor], keep: float | None
) -> tuple[torch.Tensor, int]:
    """Answer and length of what the language model reads, of a fresh model; ``keep=None``: unpatched."""
    model = load(folder, dtype=torch.float32).eval()
    if keep is not None:
        ocvtp.apply(model, make_pruner(family), keep=keep)
    with torch.no_grad():
        length = model(**inputs).logits.shape[1]
    return model.generate(**inputs, **GREEDY), length


def test_files_are_those_of_a_repository(folder: Path, family: Family) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(family.samples) <= set(index)
    assert {path.name for path in folder.glob("*.safetensors")} == set(index.values())
    for file in ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"):
        assert (folder / file).is_file()


def test_a_published_checkpoint_loads_whole(folder: Path, family: Family) -> None:
    model, report = load(folder, output_loading_info=True)
    assert not any(report.values()), report
    dtype = family.config.get("torch_dtype", "bfloat16")
    assert model.dtype == getattr(torch, dtype)
    want, got = random_model(folder).state_dict(), model.float().state_dict()
    assert got.keys() == want.keys()
    assert [key for key in want if not torch.equal(got[key], want[key])] == []


def test_a_processor_makes_as_many_placeholders_as_there_are_features(folder: Path, family: Family) -> None:
    processor = processor_of(folder, family)
    if processor is None:
        pytest.skip("its processor needs torchvision")
    inputs = processed(processor, family)
    model = load(folder, dtype=torch.float32).eval()
    placeholders = int((inputs["input_ids"] == image_token_of(model)).sum())
    assert placeholders == len(features_of(model, inputs)) > 0


def test_apply_and_generate(folder: Path, family: Family) -> None:
    model_type = family.config["model_type"]
    if model_type not in ADAPTERS:
        pytest.skip(f"no adapter for {model_type} yet")
    model = load(folder, dtype=torch.float32).eval()
    if Version(family.since) > VERSION:
        with pytest.raises(ValueError, match=f"needs transformers >= {family.since}"):
            ocvtp.apply(model, make_pruner(family), keep=0.25)
        pytest.skip(f"refused, as it should be: needs transformers >= {family.since}")
    processor = processor_of(folder, family)
    inputs = processed(processor, family) if processor else put_together(folder, family, model)
    length = inputs["input_ids"].shape[1]
    placeholders = int((inputs["input_ids"] == image_token_of(model)).sum())
    want, read = apply_and_generate(folder, family, inputs, None)
    assert read == length
    got, read = apply_and_generate(folder, family, inputs, 1.0)
    assert torch.equal(got, want)
    assert read == length
    pruned, read = apply_and_generate(folder, family, inputs, 0.25)
    assert length - placeholders <= read < length - placeholders // 2
    assert pruned.shape == (1, length + NEW)
    assert torch.equal(pruned[:, :length], inputs["input_ids"])
