"""From streams, counters and processes to rows of results."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.serving import counters
from bench.serving.load import Burst, Reply, parse
from bench.serving.presets import Load
from bench.serving.processes import cpu_seconds
from bench.serving.rows import figures, percentile, row, spread
from bench.serving.servers import ServerError

# -------------------------------------------------------------------------------------------- figures


def test_percentiles_lie_between_values() -> None:
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0
    assert percentile(list(map(float, range(21))), 95) == 19.0
    assert percentile([1.0, 2.0], 95) == pytest.approx(1.95)
    assert percentile([7.0], 95) == 7.0
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "least": 1.0, "most": 3.0}


def burst(seconds: float, first: tuple[float, ...] = (0.5, 1.5), **changes: Any) -> Burst:
    replies = tuple(Reply((1, 2, 3, 4), 90, at, at + 1.0) for at in first)
    return Burst(replies, seconds, **{"cpu_seconds": 3.0, "cache": 0.25, "running": 2, **changes})


def test_figures_of_a_round_and_of_several() -> None:
    assert figures(burst(4.0)) == {
        "requests_per_s": 0.5,
        "ttft_p50_s": 1.0,
        "ttft_p95_s": pytest.approx(1.45),
        "latency_p50_s": 2.0,
        "cpu_s_per_request": 1.5,
        "peak_cache": 0.25,
        "peak_running": 2.0,
    }
    cache = counters.Cache(blocks=227, block_size=32)
    made = row(
        "a", Load(2, 2), [burst(4.0), burst(2.0), burst(1.0, cache=0.5)], cache, answer=7, longest=1024
    )
    assert made["requests_per_s"] == {"median": 1.0, "least": 0.5, "most": 2.0}
    assert made["peak_cache"] == {"median": 0.25, "least": 0.25, "most": 0.5}
    assert (made["rounds"], made["concurrency"], made["requests"], made["prompt_tokens"]) == (3, 2, 2, 90)
    assert (made["blocks_per_request"], made["requests_that_fit"]) == (
        4,
        56,
    )  # 97 tokens are one too many for 3
    assert made["start_up_line"] == pytest.approx(7.09, abs=0.01)
    json.dumps(made)


# ------------------------------------------------------------------------------------------- counters

METRICS = """\
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="model"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="model"} 5e-1
vllm:kv_cache_usage_perc_total{engine="0"} 9
vllm:num_requests_running{engine="0",model_name="a, \\"b\\" = {c}"} 3.0
vllm:num_requests_running{engine="1",model_name="model"} 2.0 1700000000000
vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="0",num_gpu_blocks="227"} 1.0
python_info 1.0
"""


def test_counters_of_all_engines() -> None:
    assert counters.busy(METRICS) == counters.Busy(cache=0.5, running=5)
    assert counters.cache(METRICS) == counters.Cache(blocks=227, block_size=32)
    (first, _) = counters.samples(METRICS, "vllm:num_requests_running")
    assert first.labels["model_name"] == r"a, \"b\" = {c}"
    assert [one.value for one in counters.samples(METRICS, "python_info")] == [1.0]


def test_counters_that_are_not_there() -> None:
    with pytest.raises(counters.CounterError, match="reports no vllm:kv_cache_usage_perc"):
        counters.busy("vllm:kv_cache_usage_percentage 1\n")
    for labels in ('block_size="32"', 'block_size="32",num_gpu_blocks="None"'):
        with pytest.raises(counters.CounterError, match="no number of blocks"):
            counters.cache(f"vllm:cache_config_info{{{labels}}} 1\n")


def test_room_in_a_cache() -> None:
    cache = counters.Cache(blocks=10, block_size=16)
    assert [cache.of(tokens) for tokens in (1, 16, 17)] == [1, 1, 2]
    assert [cache.fit(tokens) for tokens in (16, 17, 161)] == [10, 5, 0]


# ------------------------------------------------------------------------------------------- CPU time


def process(folder: Path, number: int, parent: int, own: int, kernel: int, name: str = "python") -> None:
    (folder / str(number)).mkdir(parents=True)
    fields = ["S", parent, *range(9), own, kernel, *range(30)]
    (folder / str(number) / "stat").write_text(f"{number} ({name}) {' '.join(map(str, fields))}\n")


def test_cpu_time_is_that_of_the_whole_tree(tmp_path: Path) -> None:
    process(tmp_path, 10, 1, 100, 50)
    process(tmp_path, 11, 10, 20, 3, name="a) S 1 (b")
    process(tmp_path, 12, 11, 7, 0)
    process(tmp_path, 13, 1, 1000, 1000)
    (tmp_path / "14").mkdir()  # has ended
    (tmp_path / "uptime").touch()
    second = os.sysconf("SC_CLK_TCK")
    assert cpu_seconds(10, tmp_path) == 180 / second
    assert cpu_seconds(12, tmp_path) == 7 / second
    with pytest.raises(ProcessLookupError, match="there is no process 14"):
        cpu_seconds(14, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cpu_time_of_this_process_grows() -> None:
    before = cpu_seconds(os.getpid())
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    assert cpu_seconds(os.getpid()) - before >= 0.25


# ------------------------------------------------------------------------------------------- requests


def test_lines_of_a_stream() -> None:
    def line(**event: Any) -> bytes:
        return b"data: " + json.dumps(event).encode() + b"\n"

    assert parse(line(choices=[{"delta": {"role": "assistant"}}])) == ([], None)
    assert parse(line(choices=[{"token_ids": [4, 5]}], usage=None)) == ([4, 5], None)
    assert parse(line(choices=[], usage={"prompt_tokens": 90})) == ([], 90)
    assert parse(b"data: [DONE]\n") == parse(b"\n") == parse(b": comment\n") == ([], None)
    with pytest.raises(ServerError, match="broke off: no room"):
        parse(line(error="no room"))
