"""The small model of the test bed, asked through what the plug-in asks by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ocvtp
from bench.accuracy.loading import ASSETS, MODEL
from bench.testbed.examples import example
from ocvtp.harness.answering import Answer, Answerer, ignored, samples
from ocvtp.harness.arguments import Arguments
from ocvtp.harness.conversations import PROMPTS, Conversation, prepared
from ocvtp.harness.loading import chooser_of, load_model, load_processor, plan, prune
from ocvtp.harness.record import deciding, fingerprint, record_of, sampled_fingerprint
from ocvtp.harness.tally import Tally
from tests.vlm.hub_folders import write_folder

ONE: dict[str, Any] = {"max_new_tokens": 1}


def arguments(**values: Any) -> Arguments:
    given = {"pretrained": str(MODEL), "dtype": "float32", "merge": "off", "weigh": False, **values}
    if given.get("pruner") == "none":
        del given["merge"], given["weigh"]
    return Arguments.from_strings(given)


def talks(pictures: int, each: int) -> list[Conversation]:
    found = []
    for number in range(pictures):
        scene = example("test", number, each)
        for question in scene.questions:
            parts = [
                {"type": "image", "image": Image.fromarray(scene.pixels)},
                {"type": "text", "text": question.text},
            ]
            found.append([{"role": "user", "content": parts}])
    return found


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor(arguments(), None)


@pytest.fixture(scope="module")
def loaded(processor: Any) -> Any:
    given = arguments()
    return load_model(given, plan(given, processor)[0], torch.device("cpu"))


@pytest.fixture
def model(loaded: Any) -> Iterator[Any]:
    yield loaded
    ocvtp.remove(loaded)


def recorded(model: Any, processor: Any, system: str | None = None, **values: Any) -> dict[str, Any]:
    given, chooser, report = patched(model, processor, **values)
    return record_of(given, model, chooser, report, system, processor)


def patched(model: Any, processor: Any, **values: Any) -> tuple[Arguments, Any, Any]:
    given = arguments(**values)
    chooser = plan(given, processor)[1]
    return given, chooser, prune(given, model, chooser)


@pytest.mark.parametrize(
    ("pruner", "kept"), [("none", 256), (str(ASSETS / "testbed-pruner"), 28), ("grid", 28)]
)
def test_batches_answer_as_singles_and_count(model: Any, processor: Any, pruner: str, kept: int) -> None:
    patched(model, processor, pruner=pruner, **({} if pruner == "none" else {"keep": 28}))
    asked = talks(2, 3)
    asked.append([{"role": "user", "content": [{"type": "text", "text": "what color is the circle ?"}]}])
    answerer = Answerer(model, processor, 1)
    together = answerer.answer(asked, ONE)
    alone = [answerer.answer([one], ONE)[0] for one in asked]
    for a, b in zip(together, alone, strict=True):
        assert (a.text, a.kept_vision_tokens, a.input_tokens) == (
            b.text,
            b.kept_vision_tokens,
            b.input_tokens,
        )
    assert [one.vision_tokens for one in together] == [256] * 6 + [0]
    assert [one.kept_vision_tokens for one in together] == [kept] * 6 + [0]
    assert [one.images for one in together] == [1] * 6 + [0]
    assert all(one.output_tokens == 1 for one in together)
    assert [one.warm for one in (*together, *alone)] == [False] * 7 + [True] * 7
    assert len({one.seconds for one in together}) == 1
    assert together[0].seconds > 0


def test_the_unpruned_model_is_not_touched(model: Any, processor: Any) -> None:
    before = set(model.__dict__)
    _, _, report = patched(model, processor, pruner="none")
    assert report is None
    assert set(model.__dict__) == before
    asked = talks(1, 2)
    answers = Answerer(model, processor, 1).answer(asked, ONE)
    for answer, talk in zip(answers, asked, strict=True):
        inputs = processor.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=1, do_sample=False)
        assert answer.text == processor.decode(ids[0, -1:], skip_special_tokens=True)
        assert answer.input_tokens == inputs["input_ids"].shape[1]


def test_settings_of_a_task(model: Any, processor: Any) -> None:
    answerer = Answerer(model, processor, 77)
    greedy = answerer.settings({"until": ["\n\n"], "temperature": 0, "top_p": 0.5, "do_sample": False})
    assert greedy["max_new_tokens"] == 77
    assert (greedy["do_sample"], greedy["temperature"], greedy["top_p"]) == (False, None, None)
    assert "until" not in greedy
    drawn = answerer.settings({"temperature": 0.7, "max_new_tokens": 3, "image_aspect_ratio": "original"})
    assert (drawn["do_sample"], drawn["temperature"], drawn["max_new_tokens"]) == (True, 0.7, 3)
    assert "image_aspect_ratio" not in drawn
    assert not samples({"do_sample": False, "temperature": 0.7})
    assert samples({"do_sample": True})
    assert answerer.settings({"length_penalty": 0.5, "min_new_tokens": 2})["length_penalty"] == 0.5
    assert ignored({"until": [], "temperature": 0, "max_new_tokens": 3, "typical_p": 0.2}) == ["typical_p"]


def test_a_picture_that_is_left_out_of_the_prompt_is_no_question(model: Any, processor: Any) -> None:
    asked = talks(1, 1)[0]
    asked[0]["content"][0] = {"type": "video", "video": np.zeros((2, 128, 128, 3), np.uint8)}
    with pytest.raises(ValueError, match="left out of the prompt"):
        Answerer(model, processor, 1).answer([asked], ONE)


def test_new_tokens_end_with_the_first_end(model: Any, processor: Any) -> None:
    end = model.generation_config.eos_token_id
    fresh = torch.tensor([[7, 8, end, end], [7, end, 0, 0], [7, 8, 9, 10], [end, 7, 7, 7]])
    assert Answerer(model, processor, 1)._written(fresh).tolist() == [3, 2, 4, 1]


def test_the_plan_refuses_before_weights_are_read(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", never)
    for values, named in (
        ({"keep": 257}, "keep must be between 1 and 256"),
        ({"pruner": "/nowhere"}, "pruner: "),
        ({"pruner": str(MODEL)}, "pruner: .* is no pruner's configuration"),
        ({"pruner": "trim"}, "text_encoder: trim compares pictures with questions"),
        ({"layout": "official"}, "layout='official' is not available"),
        ({"min_pixels": 3}, "min_pixels is for Qwen"),
        ({"image_grid_pinpoints": "[[672,672]]"}, "image_grid_pinpoints is for models that cut"),
        ({"pruner": "fastv"}, "merge is for what is dropped before the language model"),
    ):
        with pytest.raises(ValueError, match=named):
            plan(arguments(**values), processor)


def test_a_pruner_of_another_encoder_is_refused(processor: Any, tmp_path: Path) -> None:
    other = ocvtp.OCPruner(ocvtp.PrunerConfig(in_dim=8, hidden_dim=8, slot_dim=8, ffn_dim=8, layer=2))
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="8"):
        plan(arguments(pruner=str(tmp_path)), processor)


def test_a_processor_is_tried_first(processor: Any, tmp_path: Path) -> None:
    without = tmp_path / "model"
    without.mkdir()
    for file in MODEL.iterdir():
        if file.name != "chat_template.jinja":
            (without / file.name).symlink_to(file)
    with pytest.raises(ValueError, match="no chat template: give chat_template=FILE"):
        load_processor(arguments(pretrained=str(without)), None)
    words = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    blind = load_processor(arguments(pretrained=str(without), chat_template=words), None)
    with pytest.raises(ValueError, match=r"puts no picture into the prompt|can't process"):
        plan(arguments(pretrained=str(without), chat_template=words), blind)
    users = "{% for m in messages if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves a system's words out"):
        load_processor(arguments(pretrained=str(without), chat_template=users), "Be brief.")
    twice = "{{ messages[0]['content'][0]['text'] }} {{ messages[0]['content'][0]['text'] }}"
    with pytest.raises(ValueError, match="2 times"):
        load_processor(arguments(pretrained=str(without), chat_template=twice), "Be brief.")
    angry = "{{ raise_exception('no system here') }}"
    with pytest.raises(ValueError, match="refuses a system's words: no system here"):
        load_processor(arguments(pretrained=str(without), chat_template=angry), "Be brief.")


def test_the_record_tells_what_ran(model: Any, processor: Any) -> None:
    record = recorded(model, processor, "Be brief.", pruner=str(ASSETS / "testbed-pruner"), keep=28)
    assert json.loads(json.dumps(record))["settings"]["keep"] == 28
    settings = record["settings"]
    assert (settings["merge"], settings["weigh"], settings["positions"]) == ("off", False, "compact")
    assert (settings["dtype"], settings["system_prompt"]) == ("float32", "Be brief.")
    assert (settings["seed"], settings["newlines"]) == (0, "last")  # what nobody said, too
    assert record["report"]["tokens_after"] == 28
    assert record["pruner"]["sha256"] == fingerprint(
        ocvtp.OCPruner.from_pretrained(ASSETS / "testbed-pruner")
    )
    assert record["versions"]["ocvtp"] == ocvtp.__version__
    assert record["processor"]["image_processor"]["image_mean"] == [0.5] * 3
    assert record["text_encoder_sha256"] is None
    resolved = recorded(model, processor, pruner="grid", keep=28, merge="auto", weigh="auto")["settings"]
    assert (resolved["merge"], resolved["weigh"]) == ("projected", True)
    assert recorded(model, processor, pruner="none")["settings"]["keep"] is None


def test_what_decides_changes_with_everything_that_does(model: Any, processor: Any) -> None:
    def decided(system: str | None = None, **values: Any) -> str:
        record = recorded(model, processor, system, **{"keep": 28, **values})
        return json.dumps(deciding(record), sort_keys=True)

    first, second = (str(ASSETS / name) for name in ("testbed-pruner", "testbed-pruner-1"))
    found = [
        decided(),
        decided(keep=29),
        decided(merge="projected"),
        decided(pruner=first),
        decided(pruner=second),
        decided(system="x"),
        decided(pad_to_square=True),
        decided(max_new_tokens=3),
    ]
    assert len(set(found)) == len(found)
    assert decided(batch_size=8, resume="folder") == found[0]
    with torch.no_grad():
        weight = model.lm_head.weight
        before = weight.clone()
        weight.mul_(1.01)
        assert decided() != found[0]
        weight.copy_(before)
    assert decided() == found[0]
    for thing, name, other in (
        (processor, "chat_template", "{{ messages }}"),
        (processor, "patch_size", 7),
        (processor.image_processor, "image_mean", [0.4] * 3),
        (model.generation_config, "repetition_penalty", 1.9),
        (model.config, "vision_feature_select_strategy", "full"),
    ):
        was = getattr(thing, name)
        setattr(thing, name, other)
        try:
            if name != "chat_template":
                assert decided() != found[0], name
            else:
                with pytest.raises(ValueError, match="picture"):
                    decided()
        finally:
            setattr(thing, name, was)
    assert decided() == found[0]


def test_fingerprints_see_names_shapes_and_numbers() -> None:
    def layer() -> torch.nn.Linear:
        torch.manual_seed(0)
        return torch.nn.Linear(3, 40)

    one, other, half = layer(), layer(), layer().half()
    assert fingerprint(one) == fingerprint(other)
    assert sampled_fingerprint(one) == sampled_fingerprint(other)
    assert fingerprint(one) != fingerprint(half)
    assert sampled_fingerprint(one) != sampled_fingerprint(half)
    with torch.no_grad():
        other.weight[39, 2] += 1e-6
    assert fingerprint(one) != fingerprint(other)
    assert sampled_fingerprint(torch.nn.Sequential(one)) != sampled_fingerprint(one)
    offloaded = layer().to("meta")
    assert sampled_fingerprint(offloaded) != sampled_fingerprint(one)


def answer(**values: Any) -> Answer:
    usual: dict[str, Any] = {
        "text": "x",
        "images": 1,
        "input_tokens": 40,
        "vision_tokens": 256,
        "kept_vision_tokens": 28,
        "vision_tokens_in_layers": 28.0,
        "output_tokens": 2,
        "seconds": 1.0,
        "preparing": 0.5,
        "warm": True,
        "asked": "",
        "timed_on": "",
    }
    return Answer(**{**usual, **values})


def test_figures_leave_the_first_batch_out() -> None:
    first, second = Tally(), Tally()
    first.add(answer(seconds=100.0, warm=False))
    first.add(answer(seconds=2.0))
    second.add(answer(seconds=50.0, warm=False))
    second.add(answer(seconds=4.0, images=2, vision_tokens=512, kept_vision_tokens=60), restored=True)
    found = Tally.of([first, second]).figures()
    assert found is not None
    assert found["requests"] == 4
    assert found["restored"] == 1
    assert found["images"] == 5
    assert found["seconds_per_image"] == pytest.approx(6 / 3)
    assert found["median_seconds_per_request"] == pytest.approx(3)
    assert found["kept_vision_tokens_per_image"] == pytest.approx((28 * 3 + 60) / 5)
    assert found["vision_tokens_per_image"] == pytest.approx(256)
    assert found["preparing_seconds_per_request"] == 0.5


def test_figures_of_nothing_and_of_words_alone() -> None:
    tally = Tally()
    assert tally.figures() is None
    tally.add(answer(images=0, vision_tokens=0, kept_vision_tokens=0, warm=False, seconds=3.0))
    found = tally.figures()
    assert found is not None
    assert "seconds_per_image" not in found
    assert found["median_seconds_per_request"] == 3.0
    tally.add(answer(warm=False, seconds=5.0))
    with_image = tally.figures()
    assert with_image is not None
    assert with_image["seconds_per_image"] == 5.0  # no batch but first ones, and not the words' seconds
    for _ in range(9):
        tally.add(answer(images=0, seconds=0.1))
    tally.add(answer(seconds=0.3))
    mixed = tally.figures()
    assert mixed is not None
    assert mixed["seconds_per_image"] == pytest.approx(0.3)


def test_seconds_of_another_batch_size_do_not_count() -> None:
    tally = Tally()
    tally.add(answer(seconds=9.0), restored=True, timed=False)
    alone = tally.figures()
    assert alone is not None
    assert not [name for name in alone if "seconds" in name]
    tally.add(answer(seconds=1.0))
    found = tally.figures()
    assert found is not None
    assert (found["seconds_per_image"], found["requests"], found["timed_requests"]) == (1.0, 2, 1)


def test_the_prompt_is_the_published_one(tmp_path: Path) -> None:
    """LLaVA-1.5's with vicuna_v1, given a template that puts a system's words first, as llava-hf's does."""
    folder = write_folder(tmp_path, "llava-hf/llava-1.5-7b-hf")
    given = Arguments.from_strings({"pretrained": str(folder), "system_prompt": "vicuna_v1"})
    system = PROMPTS["vicuna_v1"]
    made = load_processor(given, system)
    parts = [{"type": "image", "image": Image.new("RGB", (9, 5))}, {"type": "text", "text": "What is this?"}]
    asked = prepared([{"role": "user", "content": parts}], system, made.image_processor.image_mean)
    written = made.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert written == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nWhat is this? ASSISTANT:"
    )


def test_a_text_encoder_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(checkpoint: str, **options: Any) -> str:
        asked.append((checkpoint, options["decode"]))
        return "encoder"

    monkeypatch.setattr("ocvtp.vlm.rivals.ClipText.load", load)
    made = chooser_of(arguments(pruner="trim", text_encoder="clip"), "decode")
    assert made.text == "encoder"
    assert asked == [("clip", "decode")]
