"""Images, pruners and models from what a person types. Cheap checks first: a model takes long to load."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ocvtp.commands.errors import UserError, blamed_on_input
from ocvtp.commands.progress import busy

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from rich.console import Console

    from ocvtp import OCPruner, PrunerConfig, PruneReport

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_image(path: Path) -> Image:
    """The picture at ``path``, decoded, upright and in RGB."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise UserError(f"no image at {path}")
    try:
        with Image.open(path) as image:
            return _eight_bit(ImageOps.exif_transpose(image)).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} can't be decoded as an image: {error}") from error


def _eight_bit(image: Image) -> Image:
    """16-bit greyscale scaled down; pillow's own conversion would clip nearly all of it to white."""
    if not image.mode.startswith("I"):
        return image
    import numpy as np
    from PIL import Image as images

    return images.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))


def load_pruner(source: str) -> OCPruner:
    """A pruner from our folder, a Hub repository, or an official weights file."""
    from ocvtp import OCPruner

    with blamed_on_input(OSError, ValueError):
        if Path(source).is_file():
            return OCPruner.from_official(source)
        return OCPruner.from_pretrained(source)


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:1")
    device = torch.device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if not found:
            raise UserError("this machine has no usable CUDA GPU; use --device cpu")
        if (device.index or 0) >= found:
            raise UserError(f"no device {name}: this machine has {found}, numbered from 0")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU and bfloat16 (float16 before Ampere) on a GPU."""
    import torch

    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}; use one of {', '.join(DTYPES)}")
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_model(
    source: str, device: torch.device, dtype: torch.dtype, pruner: PrunerConfig, keep: int, console: Console
) -> tuple[Any, Any]:
    """``(model, processor)`` from a local folder or the Hub.

    Whether ``pruner`` and ``keep`` fit is read off the model's configuration, before its weights load.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from ocvtp.vlm.adapter import ADAPTERS

    local = Path(source).expanduser().is_dir()
    if local:
        source = str(Path(source).expanduser())
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"no model folder at {source}")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        where = "" if local else "no such folder here, and not readable from the Hub. "
        raise UserError(f"can't load the model {source!r}: {where}{error}") from error
    if config.model_type not in ADAPTERS:
        raise UserError(
            f"{source} is a {config.model_type!r} model; ocvtp prunes these: {', '.join(sorted(ADAPTERS))}"
        )
    _check_fit(config, pruner, keep)
    # transformers draws bars of its own while it downloads
    waiting = busy(console, f"loading {source}") if local else contextlib.nullcontext()
    with blamed_on_input(OSError, ValueError), waiting:
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    return model.to(device).eval(), processor


def _check_fit(config: Any, pruner: PrunerConfig, keep: int) -> None:
    vision = config.vision_config
    if pruner.in_dim != vision.hidden_size:
        raise UserError(
            f"the pruner reads features of width {pruner.in_dim}, the vision tower of this model makes them "
            f"{vision.hidden_size} wide; use a pruner trained for this tower"
        )
    tokens = (vision.image_size // vision.patch_size) ** 2
    if keep > tokens:
        raise UserError(f"--keep must be between 1 and {tokens}, the image tokens of this model; got {keep}")


@dataclass(frozen=True)
class Prepared:
    """A decoded photograph and a patched model."""

    picture: Image
    model: Any
    processor: Any
    report: PruneReport


def prepare(
    image: Path,
    *,
    model: str,
    pruner: str,
    keep: int,
    device: str,
    dtype: str,
    seed: int,
    console: Console,
    positions: Literal["auto", "compact", "original"] = "auto",
) -> Prepared:
    """Check, load and patch: everything that ``prune`` and ``visualize`` do before they differ."""
    check_keep(keep)
    picture = load_image(image)
    on = resolve_device(device)
    as_dtype = resolve_dtype(dtype, on)
    loaded_pruner = load_pruner(pruner)
    vlm, processor = load_model(model, on, as_dtype, loaded_pruner.config, keep, console)

    import ocvtp

    with blamed_on_input(ValueError):
        report = ocvtp.apply(vlm, loaded_pruner, keep=keep, positions=positions, seed=seed)
    return Prepared(picture, vlm, processor, report)


def check_keep(keep: int) -> None:
    """Catch a budget that no model could use before one is loaded."""
    if keep < 1:
        raise UserError(f"--keep must be at least 1; got {keep}")
