"""Where results go, checked before anything slow happens."""

from __future__ import annotations

import os
from pathlib import Path

from ocvtp.commands.errors import UserError


def check_writable(path: Path) -> None:
    """Catch a file that could not be written in the end."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; choose another --out")
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent} to write {path.name} into; choose another --out")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"no permission to write {path}; choose another --out")


def make_folder(path: Path) -> None:
    """Make the folder, with its parents, unless it is there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{path} is a file, not a folder; choose another --out") from error
    except OSError as error:
        raise UserError(f"can't make the folder {path} ({error.strerror}); choose another --out") from error
