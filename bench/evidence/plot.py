"""Coverage against the budget, as a picture; pillow only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK, _FAINT, _RULE = (255, 255, 255), (24, 24, 27), (113, 113, 122), (228, 228, 231)
#: Colours that colour-blind people tell apart (Okabe and Ito).
_COLOURS = (
    (0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (0, 0, 0),
    (140, 140, 60), (120, 60, 160),
)  # fmt: skip
_PANEL = (560, 420)
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 44, 56
_LEGEND_LINE = 22


class Panel(NamedTuple):
    """One set of axes."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]  # name -> points, x ascending


def chart(panels: Sequence[Panel], x_label: str, y_label: str, x_ticks: Sequence[float]) -> Image.Image:
    """Panels side by side, one legend below; a name has the same colour in all of them."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    columns = len(panels)
    legend = _LEGEND_LINE * -(-len(names) // columns) + 24
    image = Image.new("RGB", (_PANEL[0] * columns, _PANEL[1] + legend), _PAPER)
    draw = ImageDraw.Draw(image)
    for i, panel in enumerate(panels):
        _draw_panel(draw, panel, _PANEL[0] * i, colours, x_label, y_label, x_ticks)
    for i, name in enumerate(names):
        x = _LEFT + _PANEL[0] * (i % columns)
        y = _PANEL[1] + 12 + _LEGEND_LINE * (i // columns)
        draw.line((x, y, x + 26, y), colours[name], 3)
        draw.text((x + 34, y), name, _INK, _font(15), anchor="lm")
    return image


def _draw_panel(
    draw: ImageDraw.ImageDraw,
    panel: Panel,
    left: int,
    colours: Mapping[str, tuple[int, int, int]],
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float],
) -> None:
    points = [point for line in panel.lines.values() for point in line]
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    x_low, x_high = min(x_ticks), max(x_ticks)
    box = (left + _LEFT, _TOP, left + _PANEL[0] - _RIGHT, _PANEL[1] - _BOTTOM)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return box[0] + across * (box[2] - box[0]), box[3] - up * (box[3] - box[1])

    draw.text((box[0], 20), panel.title, _INK, _font(18), anchor="lm")
    for y in y_ticks:
        _, at = place(x_low, y)
        draw.line((box[0], at, box[2], at), _FAINT if y == 0 else _RULE, 1)
        draw.text((box[0] - 8, at), f"{y:g}", _FAINT, _font(14), anchor="rm")
    for x in x_ticks:
        at, _ = place(x, y_ticks[0])
        draw.text((at, box[3] + 8), f"{x:g}", _FAINT, _font(14), anchor="mt")
    draw.text(((box[0] + box[2]) / 2, _PANEL[1] - 16), x_label, _FAINT, _font(14), anchor="mm")
    draw.text((box[2], 20), y_label, _FAINT, _font(14), anchor="rm")
    for name, line in panel.lines.items():
        drawn = [place(x, y) for x, y in line]
        draw.line(drawn, colours[name], 3, joint="curve")
        for x, y in drawn:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), colours[name])


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``, four to ten of them."""
    span = max(high - low, 1e-9)
    step = 10.0**-12
    for exponent in range(-12, 13):
        for factor in (1, 2, 5):
            candidate = factor * 10.0**exponent
            if span / candidate <= 7:
                step = candidate
                first, last = int(low // step), int(-(-high // step))
                return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]
    raise ValueError(f"no axis from {low} to {high}")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
