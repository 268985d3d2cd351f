"""Served answers are those of ``ocvtp.apply`` in transformers, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.engine import folders
from tests.serving.engine.asking import (
    answers,
    ask,
    engine,
    generate,
    inputs_of,
    model_of,
    reference,
    requests,
    transformers_model,
)
from tests.serving.engine.folders import Hub
from tests.serving.engine.pruners import Pruners

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")


#: Gemma 3's small model says the same whatever it sees; its rows are compared below, with PaliGemma's.
FAMILIES = (
    folders.LLAVA,
    folders.NEXT,
    folders.ONEVISION,
    folders.QWEN2,
    folders.QWEN2_5,
    folders.QWEN3,
    folders.INTERNVL,
    folders.MOE,
    folders.IDEFICS3,
    folders.SMOLVLM,
    folders.GEMMA3,
)
#: Chunks of 16 tokens end within images; two requests at once.
CHUNKED = {"max_num_batched_tokens": 16, "max_num_seqs": 2}
NO_CACHES = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}


def keep_of(name: str) -> int:
    """Tokens to keep: fewer than an image, tile or crop has."""
    return {folders.INTERNVL: 2, folders.IDEFICS3: 3, folders.SMOLVLM: 3}.get(name, 6)


def check(folder: Path, settings: dict[str, Any] | None, **options: Any) -> None:
    """All requests at once, then in reverse from the caches."""
    asked = requests(folder)
    with engine(folder, settings, **options) as llm:
        first, again = ask(llm, asked), ask(llm, asked[::-1])[::-1]
    want = reference(folder, settings, asked)
    if folder.name != Path(folders.GEMMA3).name:  # whose rows are compared below
        assert len({tuple(one) for one in want}) > 2  # a model that says one thing would prove nothing
    assert answers(first) == want
    assert answers(again) == want


@pytest.mark.parametrize("name", FAMILIES)
def test_unpruned_is_unpruned(hub: Hub, name: str) -> None:
    """The control: vLLM and transformers agree on these models before anything is pruned."""
    if name == folders.GEMMA3:
        pytest.skip("vLLM's CPU attention is causal where transformers' is not, pruned or not")
    asked = requests(hub(name))
    with engine(hub(name), None) as llm:
        assert answers(ask(llm, asked)) == reference(hub(name), None, asked)


@pytest.mark.quick
@pytest.mark.parametrize("name", FAMILIES)
def test_by_a_pruner_in_chunks(hub: Hub, pruner_for: Pruners, name: str) -> None:
    """An OCPruner topped up by attention, images split over several steps."""
    folder = hub(name)
    chunked = CHUNKED if name not in (folders.IDEFICS3, folders.SMOLVLM) else {"max_num_batched_tokens": 64}
    check(folder, {"keep": keep_of(name), "pruner": str(pruner_for(folder))}, **chunked)


@pytest.mark.quick
def test_without_their_positions_answers_are_wrong(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and columns that nobody fills in: so the tests of Qwen-VL would notice."""
    from ocvtp.serving.vllm.positions import _COLUMNS, Positions

    def forget(self: Any, input_ids: Any, rows: Any, positions: torch.Tensor, computed: int) -> Any:
        behind = int(positions[0, -1]) + 1 - positions.shape[1]
        return [one[:, :-_COLUMNS] for one in rows], positions, behind

    def forgotten(self: Any, **given: Any) -> Any:
        return forget(self, *given.values())

    monkeypatch.setattr(Positions, "recompute_mrope_positions", forgotten)
    folder, settings = hub(folders.QWEN3), {"keep": 6, "pruner": "farthest_point"}
    asked = requests(folder)
    with engine(folder, settings) as llm:
        got = answers(ask(llm, asked))
    assert got != reference(folder, settings, asked)


@pytest.mark.quick
@pytest.mark.parametrize("settings", [{"keep": 40}, {"keep": 6, "newlines": "all"}], ids=["many", "newlines"])
def test_an_image_of_more_rows_than_the_largest(hub: Hub, settings: dict[str, Any]) -> None:
    """A tall image has more newlines, all of which stay where nothing is dropped: there is room for it."""
    check(hub(folders.NEXT), settings, max_num_batched_tokens=8, max_num_seqs=2)


@pytest.mark.quick
def test_a_batch_of_the_largest_images_is_no_larger(hub: Hub) -> None:
    """When it starts, vLLM tries as many of the largest images as fit in a step: not by what is kept."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    import ocvtp.serving

    def most(**pruned: Any) -> int:
        config = EngineArgs(model=str(hub(folders.QWEN2_5)), max_model_len=512, **pruned)
        model = config.create_engine_config().model_config
        info = MULTIMODAL_REGISTRY.create_processor(model).info
        return int(info.get_mm_max_tokens_per_item(512, {"image": 1})["image"])

    assert most(**ocvtp.serving.engine_args(str(hub(folders.QWEN2_5)), keep=6)) == most() > 1000


@pytest.mark.parametrize("name", FAMILIES)
def test_by_farthest_points(hub: Hub, name: str) -> None:
    check(hub(name), {"keep": keep_of(name), "pruner": "farthest_point"})


SETTINGS: dict[str, dict[str, Any]] = {
    "the default": {"keep": 2},
    "a share, refined": {"keep": 0.4, "pruner": "own", "refine": 2},
    "thrown away": {"keep": 2, "pruner": "own", "merge": "off"},
    "attention": {"keep": 3, "pruner": "attention"},
    "random": {"keep": 3, "pruner": "random", "seed": 7},
    "grid": {"keep": 3, "pruner": "grid", "merge": "off"},
    "one": {"keep": 1, "pruner": "own", "fill": "farthest_point"},
    "early features": {"keep": 2, "pruner": "farthest_point", "features": "early", "merge": "off"},
    "all": {"keep": 1.0},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", [folders.LLAVA, folders.NEXT, folders.QWEN2_5, folders.INTERNVL])
def test_every_way_to_choose(hub: Hub, pruner_for: Pruners, name: str, settings: dict[str, Any]) -> None:
    folder = hub(name)
    if settings.get("pruner") == "own":
        settings = {**settings, "pruner": str(pruner_for(folder))}
    check(folder, settings, **NO_CACHES)


@pytest.mark.parametrize("name", [folders.NEXT, folders.ONEVISION])
@pytest.mark.parametrize("merge", ["projected", "off"])
def test_all_newlines(hub: Hub, name: str, merge: str) -> None:
    check(hub(name), {"keep": 6, "newlines": "all", "merge": merge})


@pytest.mark.parametrize("name", [*FAMILIES[:7], folders.PALIGEMMA])
def test_prompts_are_as_short_as_promised(hub: Hub, name: str) -> None:
    """Of each image ``keep`` tokens and what the model adds, counted against the unpruned prompt."""
    folder, keep = hub(name), 3 if name != folders.INTERNVL else 2
    asked = requests(folder)[:3]
    image_token = _image_token(folder)
    with engine(folder, None) as llm:
        full = [list(one.prompt_token_ids) for one in ask(llm, asked, 1)]
    with engine(folder, {"keep": keep}) as llm:
        short = [list(one.prompt_token_ids) for one in ask(llm, asked, 1)]
    for before, after in zip(full, short, strict=True):
        images = before.count(image_token)
        extra = 1 if name in (folders.NEXT, folders.ONEVISION) else 0  # the last newline
        tiles = images // 4 if name == folders.INTERNVL else 1
        assert after.count(image_token) == keep * tiles + extra < images
        assert [t for t in after if t != image_token] == [t for t in before if t != image_token]


def _image_token(folder: Path) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder).image_token_id)


@pytest.mark.quick
@pytest.mark.parametrize("pruner", ["own", "greedy_dpp"])
@pytest.mark.parametrize("name", [folders.GEMMA3, folders.PALIGEMMA])
def test_rows_of_the_gemmas(hub: Hub, pruner_for: Pruners, name: str, pruner: str) -> None:
    """They attend both ways among image tokens, which vLLM's CPU attention can't: compare what they read."""
    from transformers import AutoProcessor

    from ocvtp.vlm.call.controller import controller_of
    from ocvtp.vlm.encode.encode import encode

    folder = hub(name)
    settings = {"keep": 6, "pruner": str(pruner_for(folder)) if pruner == "own" else pruner}
    asked = requests(folder)[:6]
    seen: list[torch.Tensor] = []
    with engine(folder, settings) as llm:
        model = model_of(llm)
        encoder = model.embed_multimodal
        model.embed_multimodal = lambda **inputs: seen.extend(rows := encoder(**inputs)) or rows
        for one in asked:
            ask(llm, [one], 1)
    controller = controller_of(transformers_model(folder, settings))
    processor = AutoProcessor.from_pretrained(folder)
    assert len(seen) == len(asked)
    for one, got in zip(asked, seen, strict=True):
        pixels = {"pixel_values": inputs_of(folder, processor, one)["pixel_values"]}
        with torch.no_grad():
            (want,) = encode(controller.adapter, pixels, controller.settings, None)["image"].rows
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [folders.LLAVA, folders.QWEN2_5])
def test_rows_that_the_caller_made_are_left_whole(hub: Hub, name: str) -> None:
    from transformers import AutoProcessor

    folder = hub(name)
    request, model = requests(folder)[0], transformers_model(folder, None)
    inputs = inputs_of(folder, AutoProcessor.from_pretrained(folder), request)
    keys = ("pixel_values", "image_grid_thw")
    with torch.no_grad():
        made = model.get_image_features(**{key: inputs[key] for key in keys if key in inputs}).pooler_output
    rows = made[0] if isinstance(made, (list, tuple)) else made.reshape(-1, made.shape[-1])
    data: Any = rows[None]
    if "image_grid_thw" in inputs:
        data = {"image_embeds": rows, "image_grid_thw": inputs["image_grid_thw"]}
    with engine(folder, {"keep": 3}, enable_mm_embeds=True) as llm:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        asked = [{"prompt": request.prompt, "multi_modal_data": {"image": data}}]
        got = answers(llm.generate(asked, sampling, use_tqdm=False))
    assert got == [generate(model, inputs)]
