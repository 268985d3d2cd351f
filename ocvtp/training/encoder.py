"""Any Hugging Face vision encoder as a maker of features: pictures in, patch tokens of one layer out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ocvtp_kernels._checks import as_int

if TYPE_CHECKING:
    from PIL.Image import Image

# How a vision-language model names its tower in a checkpoint.
_TOWER_KEYS = r"^(model\.)?vision_tower\."
_NEEDED = ("hidden_size", "num_hidden_layers", "patch_size")
# Of encoders that take video or any number of patches (Qwen-VL, VideoMAE), or end with other tokens (YOLOS).
_FOREIGN = (
    "temporal_patch_size",
    "spatial_merge_size",
    "tubelet_size",
    "num_frames",
    "num_detection_tokens",
)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class EncoderError(ValueError):
    """An encoder that can't make these features; the message says what to do."""


class _Enough(Exception):
    """The layer's output is there: what follows it need not run."""


def layer_of(layer: object, depth: int, source: str) -> int:
    """``layer`` as an int, or :class:`EncoderError` unless the encoder has it."""
    index = as_int(layer)
    if index is None or not 0 <= index < depth:
        raise EncoderError(f"layer must be between 0 and {depth - 1}, {source} has {depth}; got {layer}")
    return index


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
        tokens: N of every image.
        identity: what features depend on, JSON-ready: configuration and weights of the encoder (digests),
            preprocessing, layer, dtype.
        unit: patches along the side of a token: 1.
        fingerprint: digest of the identity; equal fingerprints mean comparable features.
        note: what had to be assumed, or ``None``.

    Raises:
        EncoderError: nothing there that can be loaded, weights missing from it, no such layer, or images
            seen in another way than as equal patches (video, tiles, merged patches, many sizes).
    """

    unit = 1

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
        layer = layer_of(layer, depth, source)
        self.name = os.path.basename(os.path.normpath(source))
        self.layer = layer
        self.width = int(config.hidden_size)
        self._processor, preprocessing, self.note = _processor(source, config)
        self._model = _load(source, config, dtype).to(device).eval()
        self._patch = config.patch_size
        self._block = _blocks(self._model, depth)[layer]
        self._device, self._dtype = device, dtype
        self.tokens = self._try()
        identity = {
            "model_type": config.model_type,
            "config": digest_json(plain(config)),
            "weights": digest_weights(self._model),
            "preprocessing": preprocessing,
            "layer": layer,
            "dtype": str(dtype).removeprefix("torch."),
        }
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))  # as it is read back
        self.fingerprint = digest_json(self.identity)

    def __call__(self, images: Sequence[Image]) -> torch.Tensor:
        """Patch tokens ``[b, N, C]`` float16 on the CPU; what comes before them in a row is left out.

        Raises:
            EncoderError: images of which another number of tokens comes out than of others.
        """
        features = self._features(images)
        if features.shape[1] != self.tokens:
            raise EncoderError(
                f"{self.name} makes {features.shape[1]} tokens of these images and {self.tokens} of others: "
                "its image processor has to make one size of them"
            )
        return features

    @torch.no_grad()
    def _features(self, images: Sequence[Image]) -> torch.Tensor:
        pixels = self._pixels(images)
        hidden = self._run(pixels.to(self._device, self._dtype))
        patches = (pixels.shape[-2] // self._patch) * (pixels.shape[-1] // self._patch)
        merged = hidden.ndim != 3 or hidden.shape[1] < patches
        if merged or hidden.shape[0] != len(images) or hidden.shape[2] != self.width:
            raise EncoderError(
                f"layer {self.layer} of {self.name} makes {list(hidden.shape)} of {len(images)} images with "
                f"{patches} patches each: encoders that merge or regroup patches are not supported"
            )
        # Class token and registers come first.
        return hidden[:, hidden.shape[1] - patches :].to("cpu", torch.float16).contiguous()

    def _pixels(self, images: Sequence[Image]) -> torch.Tensor:
        """``[b, 3, H, W]``, as the encoder takes them."""
        try:
            pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        except (ValueError, KeyError) as error:
            raise EncoderError(
                f"the image processor of {self.name} can't make one batch of images of different sizes "
                f"({error}); it has to make one size of them"
            ) from error
        if pixels.ndim != 4 or len(pixels) != len(images):
            raise EncoderError(
                f"the image processor of {self.name} makes {list(pixels.shape)} of {len(images)} images, not "
                f"[{len(images)}, 3, H, W]: video, tiles and loose patches can't be trained on. Give the "
                "folder of an image encoder, with a processor that makes one picture of one image"
            )
        return pixels

    def _try(self) -> int:
        """Tokens of an image, from a wide and a tall one; what can't work fails here, before hours of it."""
        from PIL import Image

        grey = [Image.new("RGB", size, (127, 127, 127)) for size in ((96, 64), (64, 96))]
        try:
            return int(self._features(grey).shape[1])
        except (EncoderError, torch.OutOfMemoryError):
            raise
        except (ValueError, RuntimeError, TypeError) as error:
            raise EncoderError(
                f"{self.name} can't take what its image processor makes ({error}); give an encoder that "
                "takes nothing but pixel_values, and the processor that belongs to it"
            ) from error

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
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, StrictDataclassError) as error:
        where = "" if os.path.isdir(source) else "no such folder here, and not readable from the Hub. "
        raise EncoderError(f"can't load the encoder {source!r}: {where}{error}") from error
    inner = getattr(config, "vision_config", None)
    vision = config if inner is None else inner
    lacking = [name for name in _NEEDED if not isinstance(getattr(vision, name, None), int)]
    odd = [name for name in _FOREIGN if hasattr(vision, name)]
    if lacking or odd:
        why = f"without a {lacking[0]}" if lacking else f"with a {odd[0]}"
        raise EncoderError(
            f"{source} is a {vision.model_type!r} model {why}: features can be made with "
            "transformers that see an image as equal patches (CLIP, SigLIP, DINOv2, ViT, ...)"
        )
    return vision


def _load(source: str, config: Any, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModel

    try:
        with quiet(os.path.isdir(source)):
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
def quiet(local: bool) -> Iterator[None]:
    """Of a vision-language model, transformers would list all the rest as unexpected.

    Its bars would draw over ours; from the Hub (not ``local``) they show the download, and stay.
    """
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if local:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if local and bars:
            logging.enable_progress_bar()


def _blocks(model: torch.nn.Module, depth: int) -> torch.nn.ModuleList:
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise EncoderError(f"can't tell which are the {depth} layers of a {type(model).__name__}")
    return lists[0]


class Squash:
    """What most encoders were trained with: a square; ImageNet statistics unless others are given."""

    def __init__(self, size: int, mean: tuple[float, ...] = _MEAN, std: tuple[float, ...] = _STD) -> None:
        self.size, self.mean, self.std = size, mean, std

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"size": self.size, "resample": "bicubic", "mean": self.mean, "std": self.std}

    def __call__(self, images: Sequence[Image], return_tensors: str) -> dict[str, torch.Tensor]:
        """``pixel_values`` ``[b, 3, size, size]``, called like an image processor."""
        import numpy as np
        from PIL import Image

        square = (self.size, self.size)
        pixels = np.stack([np.asarray(image.resize(square, Image.Resampling.BICUBIC)) for image in images])
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        scaled = (pixels.astype(np.float32) / 255 - mean) / std
        return {"pixel_values": torch.from_numpy(scaled).permute(0, 3, 1, 2).contiguous()}


def _processor(source: str, config: Any) -> tuple[Any, dict[str, Any], str | None]:
    """The encoder's own preprocessing, or what most encoders were trained with; its settings; a note.

    Raises:
        EncoderError: a processor that can't be loaded; only where there is none is another one assumed.
    """
    from transformers import AutoImageProcessor

    settings = processor_settings(source)
    if settings is None:
        size = getattr(config, "image_size", None)
        if not isinstance(size, int):
            raise EncoderError(
                f"{source} has no preprocessor_config.json, and its configuration no image_size of one "
                "number: put its image processor there (image_processor.save_pretrained)"
            )
        note = f"{source} has no image processor: images are squashed to {size} x {size}, ImageNet statistics"
        return Squash(size), {"class": "squash", **Squash(size).to_dict()}, note
    try:
        with quiet(os.path.isdir(source)):
            try:
                processor = AutoImageProcessor.from_pretrained(source)
            except ImportError:  # transformers < 5.20 or so, without torchvision
                processor = _on_pillow(source, str(settings.get("image_processor_type", "")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EncoderError(f"can't load the image processor of {source}: {error}") from error
    return processor, _settings(processor), None


def _on_pillow(source: str, kind: str) -> Any:
    """The image processor without torchvision, where there is one.

    Raises:
        EncoderError: there is none.
    """
    import transformers

    base = kind.removesuffix("Fast").removesuffix("Pil")
    for name in (f"{base}Pil", base):
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(transformers, name).from_pretrained(source)
    raise EncoderError(
        f"the image processor of {source} needs torchvision with this transformers: pip install torchvision"
    )


def processor_settings(source: str) -> dict[str, Any] | None:
    """How a folder or Hub repository says that images are to be prepared; ``None`` if it does not.

    Raises:
        EncoderError: that can't be told, as the Hub can't be reached or the file is damaged.
    """
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        try:
            found: str | None = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise EncoderError(f"can't look for the image processor of {source}: {error}") from error
        return found

    own = find("preprocessor_config.json")
    path = own or find("processor_config.json")
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
            settings: dict[str, Any] | None = values if own else values.get("image_processor")
            return settings
    except (ValueError, AttributeError) as error:
        raise EncoderError(f"{path} can't be read as JSON: {error}") from error


def _settings(processor: Any) -> dict[str, Any]:
    """JSON-ready, without what only says where they came from."""
    values = json.loads(json.dumps(processor.to_dict(), default=str))
    dropped = ("_name_or_path", "_processor_class", "processor_class", "image_processor_type")
    # With and without torchvision, transformers resizes a little differently, in classes of their own.
    kept = {k: v for k, v in values.items() if k not in dropped and v is not None}
    return {"class": type(processor).__name__, **kept}


def plain(config: Any) -> dict[str, Any]:
    """What of a configuration decides features."""
    dropped = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
    return {k: v for k, v in config.to_dict().items() if k not in dropped}


def digest_json(values: Any) -> str:
    """Hex digest."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def digest_weights(model: torch.nn.Module) -> str:
    """Of names and bytes of all parameters and buffers, but for poolers, which some checkpoints lack: those
    would be drawn at random, and no feature depends on them."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "pooler" in name:
            continue
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
