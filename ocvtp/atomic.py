"""Files that are there completely or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PARTIAL = ".partial"


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in its place, flushed to the disk.

    Whenever the process dies, ``path`` holds either what it held before or all of the new content.
    """
    partial = path.with_name(path.name + _PARTIAL)
    write(partial)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def write_json(path: Path, values: Any) -> None:
    """``values`` as JSON, atomically."""
    write_atomic(path, lambda partial: partial.write_text(json.dumps(values, indent=1) + "\n") and None)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
