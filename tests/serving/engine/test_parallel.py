"""Several workers for one model: shards of its weights, or stages of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving.engine import folders
from tests.serving.engine.asking import answers, ask, engine, reference, requests
from tests.serving.engine.folders import Hub
from tests.serving.engine.pruners import Pruners

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core each; functions may be sent to them."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


def same(folder: Path, settings: dict[str, Any], *first: Callable[[Any], None], **options: Any) -> int:
    """How many requests are answered as by one process. ``first`` is run in every worker before."""
    asked = requests(folder)
    with engine(folder, settings, distributed_executor_backend="mp", **options) as llm:
        for function in first:
            llm.collective_rpc(function)
        got = answers(ask(llm, asked))
    return sum(a == b for a, b in zip(got, reference(folder, settings, asked), strict=True))


@pytest.mark.parametrize("name", [pytest.param(folders.LLAVA, marks=pytest.mark.quick), folders.QWEN2_5])
def test_sharded_weights(hub: Hub, pruner_for: Pruners, name: str) -> None:
    """Each rank has half of the heads, so that neither knows what attention a token receives."""
    folder = hub(name)
    settings = {"keep": 6, "pruner": str(pruner_for(folder))}
    assert same(folder, settings, tensor_parallel_size=2) == 11


def without_average(worker: Any) -> None:
    """Each rank takes its own heads for all."""
    from ocvtp.serving.vllm import taps

    taps._mean_over_ranks = lambda scores: scores


@pytest.mark.quick
def test_without_the_average_over_ranks_it_answers_wrongly(hub: Hub) -> None:
    """So the test above would notice."""
    settings = {"keep": 3, "pruner": "attention"}
    assert same(hub(folders.LLAVA), settings, without_average, tensor_parallel_size=2) < 11


@pytest.mark.parametrize("name", [folders.LLAVA, folders.INTERNVL])
def test_stages(hub: Hub, pruner_for: Pruners, name: str) -> None:
    """The tower runs in the first. Compiled, since vLLM's CPU runner can't do it eagerly, pruned or not."""
    folder = hub(name)
    settings = {"keep": 2, "pruner": str(pruner_for(folder))}
    assert same(folder, settings, pipeline_parallel_size=2, enforce_eager=False) == 11


def test_stages_of_qwen_are_refused(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    """Only the first stage learns where kept tokens are: the second answered, and wrongly."""
    options = {"distributed_executor_backend": "mp", "pipeline_parallel_size": 2, "enforce_eager": False}
    with (
        pytest.raises(Exception, match="initialization failed"),
        engine(hub(folders.QWEN2_5), {"keep": 6}, **options),
    ):
        pass
    written = capfd.readouterr()
    said = "ocvtp: where kept tokens of Qwen-VL are is known in the first pipeline stage alone"
    assert said in written.out + written.err
