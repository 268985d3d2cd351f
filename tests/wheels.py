"""Wheels made without any build tool, in a folder that pip installs from, and from nowhere else."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest


def write_wheel(folder: Path, name: str, version: str, code: str, requires: str = "") -> None:
    """A wheel of one package; ``requires`` has lines of its metadata."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", code)
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def wheels_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make ``folder``, and keep pip to it."""
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder
