"""What operator and kernels agree on about sizes."""

from __future__ import annotations

#: Largest image that one program can hold.
MAX_TOKENS = 4096
