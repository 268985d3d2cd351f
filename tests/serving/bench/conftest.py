"""A tiny model for servers, written once."""

from __future__ import annotations

import pytest
import torch

from bench.serving.folders import Folders, write
from bench.serving.presets import PRESETS, Preset, rehearsal


@pytest.fixture(scope="session")
def tiny() -> Preset:
    return rehearsal(PRESETS["cpu-small"])


@pytest.fixture(scope="session")
def folders(tiny: Preset, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write(tiny, tmp_path_factory.mktemp("serving"), torch.device("cpu"))
