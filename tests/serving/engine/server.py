"""A running ``ocvtp serve``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Server:
    """Where it listens, and its process."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    async def ready(self, session: Any, limit: float = 300) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: it ended instead, or took too long.
        """
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.last_words()}")
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                async with session.get(f"{self.url}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.3)
        raise RuntimeError(f"the server did not start in {limit} s:\n{self.last_words()}")

    def last_words(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text().splitlines()[-20:])

    async def metric(self, session: Any, name: str) -> float:
        """The sum of a metric over its labels."""
        async with session.get(f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        found = [float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{")]
        if not found:
            raise LookupError(f"no metric {name}")
        return sum(found)


@contextlib.contextmanager
def serving(folder: Path, log: Path, *options: str) -> Iterator[Server]:
    """``ocvtp serve`` of a small model, ended with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = [
        *("--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8", "--block-size", "32"),
        *("--max-num-batched-tokens", "512", "--kv-cache-memory-bytes", str(64 << 20)),
        *("--limit-mm-per-prompt", '{"image": 2}'),
    ]
    command = [sys.executable, "-m", "ocvtp.cli", "serve", str(folder), *options, *small]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_LOGGING_LEVEL"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        yield Server(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started, if anything is left
