"""The vision side of a vision-language model as a maker of features, exactly as ``ocvtp.apply`` reads it.

Other families than LLaVA-1.5 cut an image into tiles, merge patches or see any size. To train on, every image
(or crop) is one square picture, so that all have equally many tokens, which are what that family chooses
among. The language model is never loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ocvtp.training.encoder import (
    EncoderError,
    Squash,
    digest_json,
    digest_weights,
    layer_of,
    plain,
    processor_settings,
    quiet,
)

if TYPE_CHECKING:
    from PIL.Image import Image

#: Pixels along a picture's side where the model takes any: 256 tokens of Qwen2.5-VL.
DEFAULT_SIDE = 448
# How checkpoints name the tower, old names and new ones.
_TOWER_KEYS = r"^(model\.)?(visual|vision_tower|vision_model)\.(?!vision_model\.)"
_NESTED_KEYS = r"^(model\.)?vision_tower\.vision_model\."


def is_pruned_family(source: str) -> bool:
    """Whether ``source`` is a vision-language model for this module: one that ``ocvtp.apply`` knows.

    LLaVA-1.5 is not: its tower, with its own image processor, is an encoder like any other.

    Raises:
        EncoderError: nothing there.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from ocvtp.vlm.families import ADAPTERS

    try:
        kind = AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError, StrictDataclassError) as error:
        where = "" if os.path.isdir(source) else "no such folder here, and not readable from the Hub. "
        raise EncoderError(f"can't load the encoder {source!r}: {where}{error}") from error
    return kind in ADAPTERS and kind != "llava"


class PictureEncoder:
    """Tokens of one layer of a vision-language model's tower, of square pictures.

    Args:
        source: folder or Hub id of a model that ``ocvtp.apply`` knows.
        layer: 0-based.
        device: to compute on.
        dtype: to compute in.
        side: pixels along a picture's side; by default the model's own, or :data:`DEFAULT_SIDE`.

    Attributes:
        name: last part of the source.
        width: C.
        tokens: N of every picture.
        unit: patches along the side of a token.
        identity: what features depend on, JSON-ready.
        fingerprint: digest of the identity.
        note: what had to be assumed, or ``None``.

    Raises:
        EncoderError: nothing there that can be loaded, weights missing, no such layer or side.
    """

    def __init__(
        self,
        source: str,
        layer: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        side: int | None = None,
    ) -> None:
        device = torch.device("cpu") if device is None else device
        self._adapter, config = _skeleton(source)
        facts = self._adapter.facts({})
        layer = layer_of(layer, facts.num_layers, source)
        own = self._adapter.picture_side
        if own is not None and side not in (None, own):
            raise EncoderError(f"pictures of {source} are {own} pixels wide; got {side}")
        self._side = own or side or DEFAULT_SIDE
        self.name = os.path.basename(os.path.normpath(source))
        self.layer, self.unit, self.width = layer, facts.unit, facts.width
        settings = processor_settings(source) or {}
        mean, std = settings.get("image_mean"), settings.get("image_std")
        self.note = None if mean and std else f"{source} says no pixel statistics: ImageNet's are assumed"
        self._squash = Squash(self._side, tuple(mean), tuple(std)) if mean and std else Squash(self._side)
        tower = _load(source, self._adapter.tower, dtype).to(device).eval()
        _put(self._adapter, tower)
        self._device, self._dtype = device, dtype
        self.tokens = self._try()
        identity = {
            "model_type": config.model_type,
            "config": digest_json(plain(config.vision_config)),
            "weights": digest_weights(tower),
            "preprocessing": {"class": "squash", **self._squash.to_dict()},
            "layer": layer,
            "unit": facts.unit,
            "dtype": str(dtype).removeprefix("torch."),
        }
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))  # as it is read back
        self.fingerprint = digest_json(self.identity)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image]) -> torch.Tensor:
        """Tokens ``[b, N, C]`` float16 on the CPU."""
        pixels = self._squash(images, return_tensors="pt")["pixel_values"]
        features = self._adapter.picture_features(pixels.to(self._device, self._dtype), self.layer)
        return features.to("cpu", torch.float16).contiguous()

    def _try(self) -> int:
        """Tokens of a picture; what can't work fails here, before hours of it."""
        from PIL import Image

        try:
            return int(self([Image.new("RGB", (96, 64), (127, 127, 127))]).shape[1])
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, TypeError) as error:
            raise EncoderError(
                f"{self.name} can't take pictures of {self._side} x {self._side} pixels: {error}"
            ) from error


def _skeleton(source: str) -> tuple[Any, Any]:
    """The adapter of a model without weights, and its configuration."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForImageTextToText

    from ocvtp.vlm.families import adapter_for

    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        return adapter_for(model), config
    except (OSError, ValueError, StrictDataclassError) as error:
        raise EncoderError(f"can't load the encoder of {source!r}: {error}") from error


def _load(source: str, tower: Any, dtype: torch.dtype) -> Any:
    """The tower with its weights; the rest of the checkpoint is left alone."""
    from safetensors import SafetensorError

    nested = hasattr(tower, "vision_model")  # in older releases, some towers have their name twice
    keys = {_NESTED_KEYS: "vision_model." if nested else "", _TOWER_KEYS: ""}
    try:
        with quiet(os.path.isdir(source)):
            loaded, info = type(tower).from_pretrained(
                source, config=tower.config, dtype=dtype, key_mapping=keys, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise EncoderError(f"can't load the weights of {source}: {error}") from error
    if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):
        raise EncoderError(
            f"{source} lacks weights of its vision tower, {missing[0]} and {len(missing) - 1} more"
        )
    return loaded


def _put(adapter: Any, tower: Any) -> None:
    """Give the skeleton its real tower."""
    inner = adapter.model.model
    for name, module in list(inner.named_children()):
        if module is adapter.tower:
            setattr(inner, name, tower)
            return
