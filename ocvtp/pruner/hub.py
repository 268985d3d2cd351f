"""Finding a pruner's files, in a folder or in a Hub repository."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from ocvtp.pruner.checkpoint import CheckpointError
from ocvtp.pruner.config import read_json_object


class PrunerFiles:
    """Files of a local folder or of a Hub repository.

    Args:
        source: a folder, or a repository id.
        download: keyword arguments of ``huggingface_hub.hf_hub_download`` (``revision``, ``token``, ...).

    Raises:
        TypeError, ValueError: ``source`` is no path, or empty.
        CheckpointError: ``source`` is a file.
    """

    def __init__(self, source: str | Path, **download: Any) -> None:
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(f"give a pruner's folder or repository id; got {type(source).__name__}")
        if not str(source).strip():  # as a path, this would be the current folder
            raise ValueError("give a pruner's folder or repository id; got an empty string")
        if os.path.isfile(source):
            raise CheckpointError(
                f"{source} is a file; give its folder, or read official weights with OCPruner.from_official"
            )
        self.source = source
        self._download = download
        self._cache_only = bool(download.get("local_files_only"))  # as the caller asked
        self._reason: EntryNotFoundError | None = None

    def find(self, name: str) -> Path | None:
        """The file's local path, downloaded if need be; ``None`` if it is not there.

        Raises:
            FileNotFoundError: ``source`` is neither a folder nor a possible repository id.
            HfHubHTTPError: the Hub refused (no such repository, no access).
        """
        if Path(self.source).is_dir():
            path = Path(self.source) / name
            return path if path.exists() else None
        try:
            return Path(hf_hub_download(str(self.source), name, **self._download))
        except HFValidationError as error:
            raise FileNotFoundError(
                f"{self.source} is neither a folder nor a repository id like 'name/pruner'"
            ) from error
        except EntryNotFoundError as error:
            offline = isinstance(error, LocalEntryNotFoundError)
            # The first tells why; a lost connection more than a file that the Hub doesn't have.
            if self._reason is None or (offline and not self._offline):
                self._reason = error
            if offline:  # don't wait for the network again
                self._download["local_files_only"] = True
            return None

    def missing(self, *names: str) -> FileNotFoundError:
        """The error for when none of ``names`` was found; ``raise`` it as it is, its cause is set."""
        reason = self._reason  # looking for one more file may change it
        error = FileNotFoundError(self._unreachable() if self._offline else self._without(names))
        error.__cause__ = reason
        return error

    @property
    def _offline(self) -> bool:
        return isinstance(self._reason, LocalEntryNotFoundError)

    def _unreachable(self) -> str:
        if self._cache_only:
            return f"no folder {str(self.source)!r} here, and no download of it (local_files_only=True)"
        assert self._reason is not None
        why = self._reason.__cause__ or self._reason
        return (
            f"no folder {str(self.source)!r} here, and the Hub can't be reached; "
            f"check the spelling, or the connection: {why}"
        )

    def _without(self, names: tuple[str, ...]) -> str:
        reason = f": {self._reason}" if self._reason else ""
        config = self.find("config.json")
        if config is not None and (kind := read_json_object(config).get("model_type")):
            return f"{self.source} holds a {kind!r} model, not a pruner"
        return f"{self.source} has neither {' nor '.join(names)}{reason}"
