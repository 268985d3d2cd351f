"""Prints the folder, for ``--include_path``."""

from __future__ import annotations

from ocvtp.harness.tasks import FOLDER

if __name__ == "__main__":
    print(FOLDER)
