"""What operator, kernels and reference agree on: sizes, and what is done about values that are not finite."""

from __future__ import annotations

import math
from typing import Final

#: Largest image that one program can hold.
MAX_TOKENS = 4096

#: What is done about an image whose attention or scores hold NaN or Inf: nothing; it is told by the number of
#: its picks, -1; it is told, and keeps tokens spread evenly.
ALLOW: Final = 0
FLAG: Final = 1
GRID: Final = 2
NOT_FINITE: Final = {"allow": ALLOW, "flag": FLAG, "grid": GRID}


def even_rows(tokens: int, keep: int) -> tuple[int, int]:
    """Columns of an image of ``tokens``, and in how many of its rows ``keep`` evenly spread tokens lie.

    An image is a square if that can be, else one row. Rows are evenly spaced, as many as make the steps down
    and across most alike; the tokens are divided among them as evenly as they can be, and each row's share
    is spread evenly over the row.
    """
    height = math.isqrt(tokens)
    if height * height != tokens:
        height = 1
    width = tokens // height
    down = min(height, max(-(-keep // width), round(math.sqrt(keep * height / width)), 1))
    return width, min(down, keep)
