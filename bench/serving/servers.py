"""Servers of vLLM: started, waited for, and ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.serving import counters
from bench.serving.contenders import Contender
from bench.serving.pictures import MODEL
from bench.serving.plugin import environment
from ocvtp.commands import serve

#: Seconds that a server may take to start, and to end.
STARTING, ENDING = 600.0, 30.0
_POLL = 0.25
_ERROR = re.compile(r"\b\w*(Error|Exception): ")
_HOST = "127.0.0.1"
#: Ends a server if we are killed.
_GUARD = Path(__file__).with_name("guard.py")


class ServerError(RuntimeError):
    """A server that did not start, ended early, or answered something else than it was asked."""


@dataclass(frozen=True)
class Server:
    """A process that answers, or is about to.

    Attributes:
        name: of the contender.
        url: where it listens.
        process: at the top of its processes.
        log: file with what it prints.
    """

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """Of the process at the top."""
        return self.process.pid

    def check(self) -> None:
        """Fails if it has ended.

        Raises:
            ServerError: it has; with the last lines that it printed.
        """
        if self.process.poll() is not None:
            raise ServerError(
                f"the server {self.name!r} ended with {self.process.returncode}:\n{said(self.log)}"
            )

    def read(self, path: str) -> str:
        """What it answers at ``path``.

        Raises:
            ServerError: it has ended.
            OSError: it does not answer.
        """
        self.check()
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return str(answer.read().decode())

    def wait(self, seconds: float = STARTING) -> None:
        """Until it answers.

        Raises:
            ServerError: it has ended, or takes too long.
        """
        until = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                self.read("/health")
                return
            if time.monotonic() > until:
                raise ServerError(
                    f"the server {self.name!r} is not ready after {seconds:.0f} s:\n{said(self.log)}"
                )
            time.sleep(_POLL)

    def cache(self) -> counters.Cache:
        """Its KV cache."""
        return counters.cache(self.read(counters.PATH))

    def longest(self) -> int:
        """Tokens that a request may have, its answer included."""
        return int(json.loads(self.read("/v1/models"))["data"][0]["max_model_len"])


def said(log: Path, lines: int = 12, causes: int = 5) -> str:
    """The last lines of a log, and before them its first errors, of which later ones are consequences."""
    printed = log.read_text(errors="replace").splitlines()
    errors = [line for line in printed[:-lines] if _ERROR.search(line)]
    return "\n".join([*errors[:causes], *(["..."] if errors else []), *printed[-lines:]])


def command(contender: Contender, model: Path, options: Sequence[str], port: int) -> list[str]:
    """What runs a contender, by the words of ``ocvtp serve`` and ``vllm serve``."""
    rest = [*options, "--served-model-name", MODEL, "--host", _HOST, "--port", str(port)]
    words = ["vllm", "serve", str(model), *rest]
    if contender.settings is not None:
        words = serve.words(str(model), contender.settings, rest)
    return serve.in_this_python(words)


@contextlib.contextmanager
def serving(
    those: Sequence[Contender], model: Path, options: Sequence[str], folder: Path, *, together: bool
) -> Iterator[list[Server]]:
    """Servers that are ready, for the length of a ``with`` block.

    Args:
        those: to serve.
        model: folder.
        options: of vLLM.
        folder: for logs, one for each server.
        together: start all at once. On a GPU each must see what the ones before have left.

    Raises:
        ServerError: one did not start.
    """
    variables = environment(folder / "plugin")
    begun: list[Server] = []
    try:
        for number, contender in enumerate(those):
            port = _free_port()
            words = command(contender, model, options, port)
            log = folder / f"server-{number}.log"
            begun.append(
                Server(contender.name, f"http://{_HOST}:{port}", start(words, log, variables, folder), log)
            )
            if not together:
                begun[-1].wait()
        for server in begun:
            server.wait()
        yield begun
    finally:
        end([server.process for server in begun])


def start(
    words: Sequence[str], log: Path, variables: Mapping[str, str], folder: Path, ending: float = ENDING
) -> subprocess.Popen[bytes]:
    """A guarded process in a group of its own, which ends when we do.

    Args:
        words: program and arguments.
        log: file for what it prints.
        variables: its environment.
        folder: to run in.
        ending: seconds that it has to end by itself when we are killed.
    """
    with log.open("wb") as printed:
        return subprocess.Popen(
            [sys.executable, "-I", str(_GUARD), str(ending), *words],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=dict(variables),
            cwd=folder,
            start_new_session=True,
        )


def end(processes: Sequence[subprocess.Popen[bytes]], seconds: float = ENDING) -> None:
    """Ask processes to end, and kill what is left of their groups."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    until = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((_HOST, 0))
        return int(found.getsockname()[1])
