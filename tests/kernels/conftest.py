"""What several kernels' tests ask for by name."""

from __future__ import annotations

import pytest


@pytest.fixture
def real_tiles() -> None:
    """The table's own tiles, where a test's module has coarse ones (``triton_device.coarse_tiles``)."""
