"""The benchmark of servers with vLLM: rehearsed from end to end; what clients say of a server that fails."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.e2e.methods import UNPRUNED
from bench.report.results import load
from bench.report.serving import served
from bench.serving import __main__ as command
from bench.serving.contenders import BY_RULE, WITH_PRUNER, contenders
from bench.serving.load import send
from bench.serving.processes import PROC
from bench.serving.servers import Server, ServerError

for needed in ("vllm", "aiohttp"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}", allow_module_level=True)


#: In float32, compared with transformers, two servers; in half precision, compared with itself, all three.
FULL, HALF = ("cpu-small", 2), pytest.param("llava-1.5-7b", 3, marks=pytest.mark.thorough)


@pytest.mark.parametrize(("preset", "servers"), [FULL, HALF])
def test_a_rehearsal_from_end_to_end(
    preset: str,
    servers: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gate, rounds, record, report; and nothing is left running."""
    monkeypatch.setattr(command, "contenders", lambda *given: contenders(*given)[:servers])
    given = ["--preset", preset, "--rehearse", "--record", "--results", str(tmp_path)]
    assert command.main(given) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert ("all greedy tokens are those of ocvtp.apply in transformers" in printed) == (
        preset == "cpu-small"
    )
    (path,) = tmp_path.glob("*/serving-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 3 * servers
    prompts = {row["server"]: row["prompt_tokens"] for row in rows}
    assert list(prompts.items()) == [(UNPRUNED, 586), (WITH_PRUNER, 74), (BY_RULE, 74)][:servers]
    for row in rows:
        for what in ("requests_per_s", "ttft_p50_s", "latency_p50_s", "cpu_s_per_request"):
            assert 0 < row[what]["least"] <= row[what]["median"] <= row[what]["most"], what
        assert row["ttft_p50_s"]["median"] <= row["ttft_p95_s"]["median"]
        assert row["blocks_per_request"] == (19 if row["server"] == UNPRUNED else 3)
    busiest = [row for row in rows if row["concurrency"] == 16]
    assert max(row["peak_running"]["most"] for row in busiest) > 1
    used = {row["server"]: row["peak_cache"]["most"] for row in busiest}
    assert used[UNPRUNED] > used[WITH_PRUNER] > 0
    if preset == "cpu-small":
        assert "586" in served(load(tmp_path))
    assert not [line for line in _commands() if "ocvtp-serving-" in line]


def _commands() -> Iterator[str]:
    """Command lines of all processes."""
    for folder in PROC.iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                yield (folder / "cmdline").read_text().replace("\0", " ")


# --------------------------------------------------------------------------------------- a server that fails

COUNTERS = 'vllm:kv_cache_usage_perc{engine="0"} 0.5\nvllm:num_requests_running{engine="0"} 3\n'


def event(**of: object) -> str:
    return f"data: {json.dumps(of)}\n\n"


TOKENS = event(choices=[{"token_ids": [7]}]) + event(choices=[{"token_ids": [8, 9]}])
USAGE = event(choices=[], usage={"prompt_tokens": 74}) + "data: [DONE]\n\n"


@contextlib.contextmanager
def answering(
    stream: str, status: int = 200, counters: str = COUNTERS, log: Path = Path(os.devnull)
) -> Iterator[Server]:
    """A server whose every answer is ``stream``, in this process. Afterwards its process has ended with 3."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(200, counters)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._say(status, stream)

        def _say(self, code: int, text: str) -> None:
            with contextlib.suppress(ConnectionError):  # clients that have heard enough
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *args: object) -> None:
            pass

    class Process:
        pid = os.getpid()

        returncode: int | None = None

        def poll(self) -> int | None:
            return self.returncode

    process = Process()
    served_ = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=served_.serve_forever)
    thread.start()
    try:
        yield Server("fake", f"http://127.0.0.1:{served_.server_port}", process, log)  # type: ignore[arg-type]
    finally:
        process.returncode = 3
        served_.shutdown()
        thread.join()
        served_.server_close()


def test_what_a_stream_tells() -> None:
    with answering(TOKENS + USAGE) as server:
        burst = send(server, [b"{}"] * 5, 2, answer=3, sample_s=0.01)
    assert [(reply.tokens, reply.prompt_tokens) for reply in burst.replies] == [((7, 8, 9), 74)] * 5
    assert all(0 < reply.first_s <= reply.all_s <= burst.seconds for reply in burst.replies)
    assert (burst.cache, burst.running) == (0.5, 3)


@pytest.mark.parametrize(
    ("stream", "status", "message"),
    [
        ("no such model", 404, "the server 'fake' answered 404: no such model"),
        (event(error={"message": "out of memory"}), 200, "a stream broke off: .*out of memory"),
        (USAGE, 200, "sent no tokens"),
        (TOKENS, 200, "did not count the prompt's"),
        (TOKENS + TOKENS + USAGE, 200, "answered 6 of 3 tokens"),
    ],
)
def test_answers_that_are_none(stream: str, status: int, message: str) -> None:
    with answering(stream, status) as server, pytest.raises(ServerError, match=message):
        send(server, [b"{}"] * 5, 2, answer=3, sample_s=0.01)


def test_counters_of_another_vllm() -> None:
    with (
        answering(TOKENS + USAGE, counters="vllm:something_else 1\n") as server,
        pytest.raises(command.CounterError, match="reports no vllm:kv_cache_usage_perc"),
    ):
        send(server, [b"{}"] * 300, 2, answer=3, sample_s=0.01)  # long enough to be looked at


def test_a_server_that_ends_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("loading\nMemoryError: no room\n")
    with answering("", log=tmp_path / "log") as server:
        pass
    with pytest.raises(ServerError, match="the server 'fake' ended with 3:\nloading\nMemoryError: no room"):
        send(server, [b"{}"], 1, answer=3, sample_s=0.01)
    server.process.returncode = None
    with pytest.raises(ServerError, match="the server 'fake' broke off: Client"):
        send(server, [b"{}"], 1, answer=3, sample_s=0.01)
