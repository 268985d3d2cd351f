"""Servers as processes: how they start, what they load, and that they end."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from bench.e2e.methods import UNPRUNED
from bench.serving import servers
from bench.serving.contenders import Contender, contenders
from bench.serving.folders import Folders
from bench.serving.plugin import ROOT, environment
from bench.serving.presets import Preset
from bench.serving.servers import Server, ServerError

#: Starts a child that ignores being asked to end, writes both numbers to a file, and does so itself.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # ignores it, too
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid} ")
time.sleep(600)
"""
SLEEPER = "import os, sys, time; open(sys.argv[1], 'w').write(f'{os.getpid()} '); time.sleep(600)"
POLITE = (
    "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: sys.exit(5));"
    "open(sys.argv[1], 'w').write(f'{os.getpid()} '); time.sleep(600)"
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="servers run on Linux")


def numbers(file: Path) -> list[int]:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if file.exists() and (text := file.read_text()).endswith(" "):
            return [int(word) for word in text.split()]
        time.sleep(0.02)
    raise AssertionError("the process does not start")


def gone(number: int, seconds: float = 30.0) -> bool:
    """Ended, or a zombie that nobody has collected."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@linux
def test_processes_end_with_all_below_them(tmp_path: Path) -> None:
    words = [sys.executable, "-c", STUBBORN, str(tmp_path / "numbers")]
    started = servers.start(words, tmp_path / "log", os.environ, tmp_path)
    top, child = numbers(tmp_path / "numbers")
    assert not gone(child, 0.05)
    servers.end([started], seconds=0.2)
    assert started.returncode == -signal.SIGKILL
    assert gone(top)
    assert gone(child)
    servers.end([started])  # once more does no harm


@linux
def test_a_process_that_ends_when_asked_is_not_killed(tmp_path: Path) -> None:
    started = servers.start(
        [sys.executable, "-c", POLITE, str(tmp_path / "numbers")], tmp_path / "log", os.environ, tmp_path
    )
    (child,) = numbers(tmp_path / "numbers")
    servers.end([started])
    assert started.returncode == 5
    assert gone(child)


@linux
@pytest.mark.parametrize("code", [SLEEPER, STUBBORN], ids=["a polite one", "a stubborn one"])
def test_a_process_ends_when_we_are_killed(code: str, tmp_path: Path) -> None:
    starting = f"""
        import os, sys, time
        from pathlib import Path
        from bench.serving import servers
        here = Path({str(tmp_path)!r})
        words = [sys.executable, "-c", {code!r}, str(here / "numbers")]
        servers.start(words, here / "log", os.environ, here, 0.5)
        time.sleep(600)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(starting)], cwd=ROOT)
    found = numbers(tmp_path / "numbers")
    parent.kill()
    parent.wait()
    assert all(gone(number) for number in found)


def ended(folder: Path, code: str) -> Server:
    log = folder / "log"
    started = servers.start([sys.executable, "-c", code], log, os.environ, folder)
    started.wait()
    return Server("pruned", "http://127.0.0.1:9", started, log)


@linux
def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    """The first error, which vLLM's later ones bury, and the last lines."""
    code = (
        "print('starting'); print('ValueError: no such pruner'); [print('trace', i) for i in range(50)];"
        "print('RuntimeError: see above'); raise SystemExit(7)"
    )
    server = ended(tmp_path, code)
    with pytest.raises(ServerError) as caught:
        server.wait(5.0)
    message = str(caught.value)
    assert "the server 'pruned' ended with 7" in message
    assert "ValueError: no such pruner\n...\n" in message
    assert message.endswith("trace 49\nRuntimeError: see above")
    assert "starting" not in message
    assert message.count("trace") == 11


@linux
def test_a_server_that_is_never_ready(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"]
    started = servers.start(words, tmp_path / "log", os.environ, tmp_path)
    try:
        with pytest.raises(ServerError, match="'slow' is not ready after 1 s:\nloading"):
            Server("slow", "http://127.0.0.1:9", started, tmp_path / "log").wait(1.0)
    finally:
        servers.end([started])


@linux
def test_all_servers_end_when_one_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(contender: Contender, model: Path, options: Any, port: int) -> list[str]:
        if contender.settings is None:
            return [sys.executable, "-c", STUBBORN, str(tmp_path / "numbers")]
        numbers(tmp_path / "numbers")
        return [sys.executable, "-c", "raise SystemExit('no room')"]

    def waited(self: Server) -> None:
        if self.name != UNPRUNED:
            self.process.wait()
            self.check()

    monkeypatch.setattr(servers, "command", fake)
    monkeypatch.setattr(servers, "end", functools.partial(servers.end, seconds=0.2))
    monkeypatch.setattr(Server, "wait", waited)
    with (
        pytest.raises(ServerError, match="no room"),
        servers.serving(contenders(64, tmp_path)[:2], tmp_path, (), tmp_path, together=True),
    ):
        raise AssertionError("it is not ready")
    assert all(gone(number) for number in numbers(tmp_path / "numbers"))


def test_commands_of_servers(folders: Folders, tiny: Preset) -> None:
    """Pruned ones by ``ocvtp serve``, whose settings and ours are then the same."""
    plain, pruner, rule = (
        servers.command(contender, folders.model, tiny.options, 8123)
        for contender in contenders(64, folders.pruner)
    )
    for words in (plain, pruner, rule):
        assert words[:2] == [sys.executable, "-m"]
        assert str(folders.model) in words
        assert words[words.index("--port") + 1] == "8123"
        assert words[words.index("--dtype") + 1] == "float32"
    assert "--hf-overrides" not in plain
    said = [json.loads(words[words.index("--hf-overrides") + 1]) for words in (pruner, rule)]
    assert [one["ocvtp"] for one in said] == [{"keep": 64, "pruner": str(folders.pruner)}, {"keep": 64}]
    assert {one["architectures"][0] for one in said} == {"OcvtpLlavaForConditionalGeneration"}


def test_servers_load_this_trees_plugin_and_no_unrecorded_options(tmp_path: Path) -> None:
    given = {
        **os.environ,
        "PYTHONPATH": "elsewhere",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CACHE_ROOT": "/cache",
    }
    made = environment(tmp_path / "plugin", given)
    assert "VLLM_LOGGING_LEVEL" not in made
    assert (made["VLLM_CACHE_ROOT"], made["HF_HUB_OFFLINE"]) == ("/cache", "1")
    assert made["PYTHONPATH"].endswith(f"{os.sep}elsewhere")
    code = (
        "from importlib.metadata import entry_points; import ocvtp, ocvtp_kernels;"
        "(one,) = entry_points(group='vllm.general_plugins', name='ocvtp');"
        "print(one.value, one.load().__module__);"
        "print(ocvtp.__file__)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=made, capture_output=True, text=True, check=True
    )
    found, file = printed.stdout.splitlines()
    assert found == "ocvtp.serving.vllm:register ocvtp.serving.vllm"
    assert Path(file) == ROOT / "ocvtp" / "__init__.py"
