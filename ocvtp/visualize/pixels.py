"""The picture that a model sees."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image


def unnormalize(
    pixel_values: npt.ArrayLike, mean: Sequence[float], std: Sequence[float], rescale: float = 1 / 255
) -> Image.Image:
    """The picture behind an image processor's output: exactly the pixels the model's patches cut up.

    Args:
        pixel_values: ``[3, H, W]`` floating point, ``(pixel * rescale - mean) / std``.
        mean: three channel means.
        std: three channel deviations.
        rescale: the processor's ``rescale_factor``.

    Returns:
        An RGB image of ``W x H`` pixels.

    Raises:
        ValueError: a shape or a number of channels that does not fit, or a ``std`` or ``rescale`` of 0.
    """
    values = np.asarray(pixel_values, dtype=np.float64)
    if values.ndim != 3 or values.shape[0] != 3 or 0 in values.shape:
        raise ValueError(f"pixel_values must be [3, H, W]; got shape {list(values.shape)}")
    if len(mean) != 3 or len(std) != 3 or not all(std) or not rescale:
        raise ValueError(
            f"mean and std must be three numbers each, std and rescale not 0; got {mean}, {std}, {rescale}"
        )
    pixels = values.transpose(1, 2, 0) * np.asarray(std) + np.asarray(mean)
    return Image.fromarray(np.clip(np.rint(pixels / rescale), 0, 255).astype(np.uint8))
