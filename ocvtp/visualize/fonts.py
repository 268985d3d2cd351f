"""Letters."""

from __future__ import annotations

from PIL import ImageFont


def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own, which is there wherever pillow is."""
    return ImageFont.load_default(size)
