"""Other ways to run an engine: under pressure, with adapters, in half precision, compiled."""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ocvtp
from tests.serving.engine import folders
from tests.serving.engine.asking import (
    Answer,
    Request,
    answers,
    ask,
    engine,
    generate,
    inputs_of,
    reference,
    requests,
    transformers_model,
)
from tests.serving.engine.folders import Hub
from tests.serving.engine.pruners import Pruners

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")

ASSETS = Path(__file__).parents[3] / "assets"


@pytest.mark.parametrize("name", [folders.LLAVA, folders.QWEN2_5, folders.QWEN3])
def test_preempted_requests(hub: Hub, pruner_for: Pruners, name: str) -> None:
    """Seven blocks are too few for four requests of 60 tokens: some are put back, and encoded again."""
    folder = hub(name)
    settings, asked = {"keep": 6, "pruner": str(pruner_for(folder))}, requests(folder)
    tight = {"num_gpu_blocks_override": 7, "max_model_len": 192, "max_num_batched_tokens": 48}
    preempted: list[str] = []
    with engine(folder, settings, **tight, disable_log_stats=False) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request
        scheduler._preempt_request = lambda request, *a, **k: (
            preempted.append(request.request_id),
            preempt(request, *a, **k),
        )[1]
        got = answers(ask(llm, asked, 60))
    assert preempted
    assert got == reference(folder, settings, asked, 60)


@pytest.mark.quick
def test_an_adapter_on_the_language_model(hub: Hub, pruner_for: Pruners, tmp_path: Path) -> None:
    from transformers import AutoProcessor
    from vllm.lora.request import LoRARequest

    folder = hub(folders.LLAVA)
    settings, asked = {"keep": 6, "pruner": str(pruner_for(folder))}, requests(folder)
    deltas = dict(_write_adapter(tmp_path, folder))
    with engine(folder, settings, enable_lora=True, max_lora_rank=8, max_loras=1) as llm:
        plain = answers(ask(llm, asked))
        adapted = answers(ask(llm, asked, lora_request=LoRARequest("one", 1, str(tmp_path))))
    assert plain == reference(folder, settings, asked)
    model, processor = transformers_model(folder, settings), AutoProcessor.from_pretrained(folder)
    for name, delta in deltas.items():
        model.get_submodule(name).weight.data += delta
    assert adapted == [generate(model, inputs_of(folder, processor, one)) for one in asked]
    assert adapted != plain


def _write_adapter(out: Path, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """An adapter of random weights; yields what it adds to which linear layer."""
    torch.manual_seed(1)
    state = {}
    for layer in range(2):
        for part in ("q_proj", "o_proj"):
            down, up = torch.randn(8, 64) * 0.2, torch.randn(64, 8) * 0.2
            inside = f"language_model.{{}}layers.{layer}.self_attn.{part}"
            theirs = f"base_model.model.{inside.format('model.')}"
            state |= {f"{theirs}.lora_A.weight": down, f"{theirs}.lora_B.weight": up}
            yield f"model.{inside.format('')}", up @ down
    save_file(state, out / "adapter_model.safetensors")
    config = {
        "base_model_name_or_path": str(folder),
        "bias": "none",
        "lora_alpha": 8,
        "peft_type": "LORA",
        "r": 8,
        "target_modules": ["q_proj", "o_proj"],
        "task_type": "CAUSAL_LM",
    }
    (out / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def testbed() -> tuple[dict[str, Any], list[Request], list[str], list[Answer]]:
    """Settings, questions about scenes, right answers, and what transformers answers in float32."""
    from transformers import AutoProcessor

    settings = {"keep": 28, "pruner": str(ASSETS / "testbed-pruner")}
    asked, right = [], []
    for scene in json.loads((ASSETS / "scenes/questions.json").read_text()):
        picture = Image.open(ASSETS / "scenes" / scene["picture"]).convert("RGB")
        for one in scene["questions"]:
            asked.append(Request(f"<image> {one['question']} answer:", (picture,)))
            right.append(one["answer"])
    folder = ASSETS / "testbed"
    model, processor = transformers_model(folder, settings), AutoProcessor.from_pretrained(folder)
    want = [_until_the_end(model, processor, one) for one in asked]
    return settings, asked, right, want


def _until_the_end(model: Any, processor: Any, request: Request) -> Answer:
    """As somebody asks who wants an answer, not a number of tokens."""
    inputs = processor(images=list(request.images), text=[request.prompt], return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answer: Answer = out[0, inputs["input_ids"].shape[1] :].tolist()
    return answer


WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "compiled language model": {"enforce_eager": False},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_trained_model(testbed: Any, options: dict[str, Any]) -> None:
    """Half precision and compilation answer questions as float32 does, and nearly all of them rightly."""
    from vllm import SamplingParams

    settings, asked, right, want = testbed
    with engine(ASSETS / "testbed", settings, **options) as llm:
        sampling = SamplingParams(temperature=0, max_tokens=4)
        outputs = llm.generate([one.for_vllm() for one in asked], sampling, use_tqdm=False)
    assert answers(outputs) == want
    assert sum(o.outputs[0].text.strip() == a for o, a in zip(outputs, right, strict=True)) >= 44


@pytest.mark.quick
@pytest.mark.parametrize("pruner", ["own", "attention"])
def test_a_hook_that_does_not_fire_is_noticed(
    hub: Hub, pruner_for: Pruners, monkeypatch: pytest.MonkeyPatch, pruner: str
) -> None:
    """A tower that goes around them is an error, and is not pruned by whatever was there before."""
    folder = hub(folders.LLAVA)
    chosen = str(pruner_for(folder)) if pruner == "own" else pruner
    monkeypatch.setattr(torch.nn.Module, "register_forward_pre_hook", lambda *_, **__: _NoHook())
    with (
        pytest.raises(RuntimeError, match="runs its vision tower around our hooks") as caught,
        engine(folder, {"keep": 6, "pruner": chosen}) as llm,
    ):
        ask(llm, requests(folder)[:1])
    traceback.clear_frames(caught.tb)  # they hold the engine, which must end before the next one begins
    gc.collect()


class _NoHook:
    def remove(self) -> None:
        pass


def test_ocvtp_is_the_same_here_and_there() -> None:
    """The environment has this checkout, not a release."""
    assert Path(ocvtp.__file__).is_relative_to(Path(__file__).parents[3])
