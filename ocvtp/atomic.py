"""Files that are there completely or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: What the folder is called, after the file, in which a file is being written.
PARTIAL = ".partial"


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file in a folder beside ``path``, then put it in its place, flushed to the disk.

    Whenever the process dies, ``path`` holds either what it held before or all of the new content. What was
    begun stays in a folder ``<name>.partial``, which the next call for the same path clears: writers that
    work on temporary files of their own, as safetensors does, leave those there, too.

    Raises:
        IsADirectoryError: ``path`` is a folder; nothing has been written.
        OSError: as when the disk is full.
    """
    if path.is_dir():
        raise IsADirectoryError(
            errno.EISDIR, "a folder stands where a file is to be written, move it away", str(path)
        )
    staging = path.with_name(path.name + PARTIAL)
    remove(staging)
    staging.mkdir()
    partial = staging / path.name
    write(partial)
    # safetensors makes files that only their owner can read; a new folder has the rights the user wants.
    partial.chmod(staging.stat().st_mode & 0o666)
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)
    remove(staging)


def write_json(path: Path, values: Any) -> None:
    """``values`` as JSON, atomically."""
    write_atomic(path, lambda partial: partial.write_text(json.dumps(values, indent=1) + "\n"))


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Take away a file, a folder with all that is in it, or a link, never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
