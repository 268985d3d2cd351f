"""A patched LLaVA, counted: its vision side at real size without data, a whole call at tiny size with.

The vision side (tower, choice, projector) runs on ``meta`` as on a GPU. A whole call can't: it looks at its
prompt. For it :mod:`bench.guard.remote` has a device with values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import ocvtp
from bench.guard.count import count
from bench.guard.remote import Remote, move, remote_device
from ocvtp.cost.published import CLIP_L_336
from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.encode.encode import encode

IMAGE = 120


def rows() -> dict[str, dict[str, Any]]:
    """Rows of the snapshot, by name."""
    found = {}
    for images in (1, 4):
        counts = count(vision_side(images)).row()
        # Attention of the tower is written out on meta, so its operators and memory are not a GPU's.
        kept = ("launches", "flops", "torch_flops", "waits")
        found[f"vision side of LLaVA-1.5, images {images}"] = {name: counts[name] for name in kept}
    for name, call in forwards().items():
        found[f"forward of LLaVA, {name}"] = {"waits": waits(call)}
    return found


def vision_side(images: int) -> Callable[[], object]:
    """Tower, choice of 64 of 576 tokens, projector: CLIP-L/14-336, the published pruner."""
    return vision_call(vision_model(), images)


def vision_model(
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "meta",
    *,
    vision: CLIPVisionConfig | None = None,
    pruner: ocvtp.PrunerConfig | None = None,
    keep: int = 64,
    **options: Any,
) -> Any:
    """A LLaVA-1.5 whose vision side is as published, unless said, patched, and a small language model.

    ``options`` are those of :func:`ocvtp.apply`. On ``meta`` it is without data, elsewhere random.
    """
    with torch.device(device):
        model = _llava(vision or CLIPVisionConfig(**CLIP_L_336)).to(dtype)
        chooser = ocvtp.OCPruner(pruner).eval()
    ocvtp.apply(model, chooser, keep=keep, **options)
    return model


def vision_call(model: Any, images: int) -> Callable[[], object]:
    """The vision side of a patched ``model``, on so many images, wherever it lies."""
    controller = controller_of(model)
    side = model.config.vision_config.image_size
    pixels = torch.zeros(images, 3, side, side, dtype=model.dtype, device=model.device)

    @torch.no_grad()
    def call() -> object:
        return encode(controller.adapter, {"pixel_values": pixels}, controller.settings, None)

    return call


def small_vision(side: int = 56) -> CLIPVisionConfig:
    """A tower of five narrow layers, for images ``side`` pixels wide."""
    return CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=side,
        patch_size=14,
    )


def small_text() -> LlamaConfig:
    """A language model of one narrow layer."""
    return LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )


def small_pruner() -> ocvtp.PrunerConfig:
    """For the features of :func:`small_vision`."""
    return ocvtp.PrunerConfig(in_dim=64, hidden_dim=96, slot_dim=32, ffn_dim=64, layer=2)


def forwards() -> dict[str, Callable[[], object]]:
    """A tiny model's ``forward`` on two prompts with an image each, one padded; as it is, and pruned."""
    vision, config = small_vision(), small_pruner()
    image = [IMAGE] * 16
    inputs = {
        "input_ids": torch.tensor([[0, 0, 1, *image, 7], [1, 5, 6, *image, 9]]),
        "attention_mask": torch.tensor([[0, 0, *[1] * 18], [1] * 20]),
        "pixel_values": torch.linspace(-1, 1, 2 * 3 * 56 * 56).view(2, 3, 56, 56),
    }
    remote = {name: Remote(tensor) for name, tensor in inputs.items()}

    def forward(model: Any) -> object:
        with torch.no_grad():
            return model(**remote)

    plain, pruned, pruner = move(_llava(vision)), move(_llava(vision)), ocvtp.OCPruner(config).eval()
    ocvtp.apply(pruned, move(pruner), keep=5, backend="torch")
    return {
        "unpruned": functools.partial(forward, plain),
        "pruned": functools.partial(forward, pruned),
    }


def waits(call: Callable[[], object]) -> dict[str, int]:
    """What makes the host wait in the second ``call``, which computes with :class:`Remote` tensors."""
    for _ in range(2):
        with remote_device() as found:
            call()
    return dict(sorted((+found).items()))


def _llava(vision: CLIPVisionConfig) -> Any:
    config = LlavaConfig(
        vision_config=vision,
        text_config=small_text(),
        image_token_index=IMAGE,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
    )
    return LlavaForConditionalGeneration(config).eval()
