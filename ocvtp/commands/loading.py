"""Images, pruners and models from what a person types. Cheap checks first: a model takes long to load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ocvtp.commands.errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from ocvtp import OCPruner

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_image(path: Path) -> Image:
    """The picture at ``path``, decoded, upright and in RGB."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise UserError(f"no image at {path}")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} can't be decoded as an image: {error}") from error


def load_pruner(source: str) -> OCPruner:
    """A pruner from our folder, a Hub repository, or an official weights file."""
    from ocvtp import OCPruner

    if Path(source).is_file():
        return OCPruner.from_official(source)
    return OCPruner.from_pretrained(source)


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}; use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine has no usable CUDA GPU; use --device cpu")
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


def load_model(source: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """``(model, processor)`` from a local folder or the Hub."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from ocvtp.vlm.adapter import ADAPTERS

    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise UserError(f"no model folder at {source}")
    config = AutoConfig.from_pretrained(source)
    if config.model_type not in ADAPTERS:
        raise UserError(
            f"{source} is a {config.model_type!r} model; ocvtp prunes these: {', '.join(sorted(ADAPTERS))}"
        )
    processor = AutoProcessor.from_pretrained(source)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype).to(device).eval()
    return model, processor


def check_keep(keep: int) -> None:
    """Catch a budget that no model could use before one is loaded."""
    if keep < 1:
        raise UserError(f"--keep must be at least 1; got {keep}")
