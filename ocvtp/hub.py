"""Finding a pruner's files, in a folder or in a Hub repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError


class PrunerFiles:
    """Files of a local folder or of a Hub repository.

    Args:
        source: a folder, or a repository id.
        download: keyword arguments of ``huggingface_hub.hf_hub_download`` (``revision``, ``token``, ...).
    """

    def __init__(self, source: str | Path, **download: Any) -> None:
        self.source = source
        self._download = download
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
            if isinstance(error, LocalEntryNotFoundError):  # offline: don't wait for the network again
                self._download["local_files_only"] = True
            self._reason = error
            return None

    def missing(self, *names: str) -> FileNotFoundError:
        """The error for when none of ``names`` was found; says why if the Hub told."""
        error = FileNotFoundError(f"{self.source} has neither {' nor '.join(names)}")
        if self._reason is not None:
            error = FileNotFoundError(f"{error}: {self._reason}")
        return error
