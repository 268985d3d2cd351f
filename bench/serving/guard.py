"""Runs a command, and ends it when whoever started this is gone: ``python guard.py SECONDS COMMAND ...``.

Standard input must be a pipe that nobody writes to. It closes when the process at its other end ends, even if
that was killed. This then asks the command to end, and after so many seconds kills what is left of the
process group, which must be one of its own. Needs nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence


def main(seconds: float, words: Sequence[str]) -> int:
    """Run, pass on the wish to end, return the command's exit status."""
    command = subprocess.Popen(list(words), stdin=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, lambda number, frame: command.terminate())
    threading.Thread(target=_watch, args=(command, seconds), daemon=True).start()
    code = command.wait()
    return code if code >= 0 else 128 - code


def _watch(command: subprocess.Popen[bytes], seconds: float) -> None:
    while os.read(0, 1):
        pass
    command.terminate()
    try:
        command.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        os.killpg(os.getpgid(0), signal.SIGKILL)  # this process is in it, too


if __name__ == "__main__":
    raise SystemExit(main(float(sys.argv[1]), sys.argv[2:]))
