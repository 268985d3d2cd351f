"""What ends the start of a server."""

from __future__ import annotations

from ocvtp_kernels import BackendUnavailableError

#: What a wrong setting may raise.
REFUSALS = (TypeError, ValueError, OSError, BackendUnavailableError)


class ServingError(RuntimeError):
    """Settings that can't be served; the server does not start.

    Not a ``ValueError``: that would make vLLM serve text only, with a warning.
    """
