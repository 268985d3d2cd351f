"""What operator and kernels agree on about sizes."""

from __future__ import annotations

MAX_HEAD_DIM = 128
#: Of a packed batch: their bounds are searched in registers.
MAX_SEGMENTS = 4096
