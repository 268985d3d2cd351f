"""A model of random weights and a pruner for it, as folders that a server loads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.e2e.presets import build
from bench.serving.presets import Preset
from bench.testbed.language import BEGIN, END, IMAGE, PAD, VOCABULARY, build_processor

#: Weights are this much larger than a fresh model's, whose answers hardly depend on the picture.
_SPREAD = 3.0
# The first that fits.
_NAMES = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


@dataclass(frozen=True)
class Folders:
    """What was written.

    Attributes:
        model: folder, weights, configuration and processor in it.
        pruner: folder.
        side: pixels along a picture's side.
        image_tokens: of a picture, unpruned.
        parameters: of the ``vision`` side, the ``language`` model and the ``pruner``.
    """

    model: Path
    pruner: Path
    side: int
    image_tokens: int
    parameters: dict[str, int]


def write(preset: Preset, folder: Path, device: torch.device) -> Folders:
    """Draw weights on a device and write them below ``folder``. Nothing stays on the device."""
    config = preset.config()
    _speak(config)
    model, pruner = build(config, device, **preset.pruner)
    model.to(getattr(torch, preset.dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(_SPREAD)
    vision = config.vision_config
    found = Folders(
        model=folder / "model",
        pruner=folder / "pruner",
        side=vision.image_size,
        image_tokens=(vision.image_size // vision.patch_size) ** 2,
        parameters=_count(model, pruner),
    )
    _save(model, found.model)
    build_processor(vision.image_size, vision.patch_size).save_pretrained(found.model)
    _fill_up(found.model / "tokenizer.json", config.get_text_config().vocab_size)
    pruner.save_pretrained(found.pruner)
    del model, pruner
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _speak(config: Any) -> None:
    """Give a configuration the special tokens of the small tokenizer."""
    config.image_token_id = VOCABULARY[IMAGE]
    for part in (config, config.get_text_config()):
        part.pad_token_id, part.bos_token_id, part.eos_token_id = (
            VOCABULARY[word] for word in (PAD, BEGIN, END)
        )


def published_name(name: str) -> str:
    """What a weight of a LLaVA is called in checkpoints on the Hub, which is what servers expect."""
    return next(theirs + name[len(ours) :] for ours, theirs in _NAMES if name.startswith(ours))


def _save(model: Any, folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = {published_name(name): weight for name, weight in model.state_dict().items()}
    save_torch_state_dict(weights, folder)


def _count(model: Any, pruner: torch.nn.Module) -> dict[str, int]:
    language = sum(p.numel() for p in model.model.language_model.parameters()) + model.lm_head.weight.numel()
    return {
        "vision": sum(p.numel() for p in model.parameters()) - language,
        "language": language,
        "pruner": sum(p.numel() for p in pruner.parameters()),
    }


def _fill_up(tokenizer: Path, size: int) -> None:
    """Give every token that the model may answer a word: a server has to spell it."""
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    words.update({f"<unused{number}>": number for number in range(len(words), size)})
    tokenizer.write_text(json.dumps(content), encoding="utf-8")
