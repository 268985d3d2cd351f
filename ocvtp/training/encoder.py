"""Any Hugging Face vision encoder as a maker of features: pictures in, patch tokens of one layer out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

# How a vision-language model names its tower in a checkpoint.
_TOWER_KEYS = r"^(model\.)?vision_tower\."
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class EncoderError(ValueError):
    """An encoder that can't make these features; the message says what to do."""


class _Enough(Exception):
    """The layer's output is there: what follows it need not run."""


class FeatureEncoder:
    """Patch tokens of one layer of a vision encoder.

    Args:
        source: folder or Hub id of a vision encoder (CLIP, SigLIP, DINOv2, ViT, ...), of a model that has one
            beside a text encoder, or of a LLaVA, of which the tower alone is loaded.
        layer: 0-based; its output is ``hidden_states[layer + 1]``.
        device: to compute on.
        dtype: to compute in.

    Attributes:
        name: last part of the source.
        width: C.
        identity: what features depend on, JSON-ready: configuration and weights of the encoder (digests),
            preprocessing, layer, dtype.
        fingerprint: digest of the identity; equal fingerprints mean comparable features.
        note: what had to be assumed, or ``None``.

    Raises:
        EncoderError: nothing there that can be loaded, weights missing from it, no such layer.
    """

    def __init__(
        self,
        source: str,
        layer: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        device = torch.device("cpu") if device is None else device
        config = vision_config(source)
        depth = config.num_hidden_layers
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < depth:
            raise EncoderError(f"layer must be between 0 and {depth - 1}, {source} has {depth}; got {layer}")
        self.name = os.path.basename(os.path.normpath(source))
        self.layer = layer
        self.width = int(config.hidden_size)
        self._processor, preprocessing, self.note = _processor(source, config)
        self._model = _load(source, config, dtype).to(device).eval()
        self._patch = config.patch_size
        self._block = _blocks(self._model, depth)[layer]
        self._device, self._dtype = device, dtype
        identity = {
            "model_type": config.model_type,
            "config": _digest_json(_plain(config)),
            "weights": _digest_weights(self._model),
            "preprocessing": preprocessing,
            "layer": layer,
            "dtype": str(dtype).removeprefix("torch."),
        }
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))  # as it is read back
        self.fingerprint = _digest_json(self.identity)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image]) -> torch.Tensor:
        """Patch tokens ``[b, N, C]`` float16 on the CPU; what comes before them in a row is left out.

        Raises:
            EncoderError: images that the processor makes patches of in a way this can't follow.
        """
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        if pixels.ndim != 4:
            raise EncoderError(
                f"the processor of {self.name} makes {list(pixels.shape)} of {len(images)} images; images "
                "cut into tiles can't be trained on: give the folder of the vision encoder itself"
            )
        hidden = self._run(pixels.to(self._device, self._dtype))
        patches = (pixels.shape[-2] // self._patch) * (pixels.shape[-1] // self._patch)
        prefix = hidden.shape[1] - patches  # class token, registers
        if prefix < 0:
            raise EncoderError(
                f"layer {self.layer} of {self.name} has {hidden.shape[1]} tokens for {patches} patches: "
                "encoders that merge patches on the way are not supported"
            )
        return hidden[:, prefix:].to("cpu", torch.float16)

    def _run(self, pixels: torch.Tensor) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def stop(module: object, args: object, output: Any) -> None:
            found.append(output if isinstance(output, torch.Tensor) else output[0])
            raise _Enough

        handle = self._block.register_forward_hook(stop)
        try:
            with contextlib.suppress(_Enough):
                self._model(pixel_values=pixels)
        finally:
            handle.remove()
        return found[0]


def vision_config(source: str) -> Any:
    """Configuration of the vision encoder in a folder or on the Hub; loads no weights.

    Raises:
        EncoderError: nothing there, or no encoder that makes one token for every patch.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        where = "" if os.path.isdir(source) else "no such folder here, and not readable from the Hub. "
        raise EncoderError(f"can't load the encoder {source!r}: {where}{error}") from error
    inner = getattr(config, "vision_config", None)
    vision = config if inner is None else inner
    for name in ("hidden_size", "num_hidden_layers", "patch_size"):
        if not isinstance(getattr(vision, name, None), int):
            raise EncoderError(
                f"{source} is a {vision.model_type!r} model without a {name}: features can be made with "
                "transformers that see an image as equal patches (CLIP, SigLIP, DINOv2, ViT, ...)"
            )
    return vision


def _load(source: str, config: Any, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModel

    try:
        with _no_load_report():
            model, info = AutoModel.from_pretrained(
                source, config=config, dtype=dtype, key_mapping={_TOWER_KEYS: ""}, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise EncoderError(f"can't load the weights of {source}: {error}") from error
    # A pooler comes after all layers, and some checkpoints leave it out.
    if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):
        raise EncoderError(
            f"{source} lacks weights of its vision encoder, {missing[0]} and {len(missing) - 1} more: "
            "give the folder of the encoder itself"
        )
    return model


@contextlib.contextmanager
def _no_load_report() -> Iterator[None]:
    """Of a vision-language model, transformers would list all the rest as unexpected."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _blocks(model: torch.nn.Module, depth: int) -> torch.nn.ModuleList:
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise EncoderError(f"can't tell which are the {depth} layers of a {type(model).__name__}")
    return lists[0]


class _Squash:
    """What most encoders were trained with: a square, ImageNet statistics."""

    def __init__(self, size: int) -> None:
        self.size = size

    def to_dict(self) -> dict[str, Any]:
        return {"size": self.size, "resample": "bicubic", "mean": _MEAN, "std": _STD}

    def __call__(self, images: Sequence[Image], return_tensors: str) -> dict[str, torch.Tensor]:
        import numpy as np
        from PIL import Image

        square = (self.size, self.size)
        pixels = np.stack([np.asarray(image.resize(square, Image.Resampling.BICUBIC)) for image in images])
        scaled = (pixels.astype(np.float32) / 255 - np.float32(_MEAN)) / np.float32(_STD)
        return {"pixel_values": torch.from_numpy(scaled).permute(0, 3, 1, 2).contiguous()}


def _processor(source: str, config: Any) -> tuple[Any, dict[str, Any], str | None]:
    """The encoder's own preprocessing, or what most encoders were trained with; its settings; a note."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError):
        size = config.image_size
        note = f"{source} has no image processor: images are squashed to {size} x {size}, ImageNet statistics"
        return _Squash(size), {"class": "squash", **_Squash(size).to_dict()}, note
    return processor, _settings(processor), None


def _settings(processor: Any) -> dict[str, Any]:
    """JSON-ready, without what only says where they came from."""
    values = json.loads(json.dumps(processor.to_dict(), default=str))
    dropped = ("_name_or_path", "_processor_class", "processor_class", "image_processor_type")
    # With and without torchvision, transformers resizes a little differently, in classes of their own.
    kept = {k: v for k, v in values.items() if k not in dropped and v is not None}
    return {"class": type(processor).__name__, **kept}


def _plain(config: Any) -> dict[str, Any]:
    dropped = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
    return {k: v for k, v in config.to_dict().items() if k not in dropped}


def _digest_json(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _digest_weights(model: torch.nn.Module) -> str:
    """Of names and bytes of all parameters and buffers."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
