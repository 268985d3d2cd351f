"""What is served and asked, and what must be answered before anything is timed."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from bench.e2e.methods import UNPRUNED
from bench.micro.gates import GateError
from bench.serving import gate
from bench.serving.contenders import BY_RULE, WITH_PRUNER, contenders
from bench.serving.folders import Folders, published_name
from bench.serving.gate import Answered, Questions
from bench.serving.measure import bodies
from bench.serving.pictures import body, message, picture, question
from bench.serving.presets import PRESETS, Load, Preset, rehearsal

# ------------------------------------------------------------------------------------- what is served


def test_a_folder_is_a_checkpoint_as_published(folders: Folders, tiny: Preset) -> None:
    """Loaded again it is the model whose weights were drawn, and every answer can be spelt."""
    from safetensors import safe_open
    from transformers import AutoModelForImageTextToText, AutoProcessor

    config = json.loads((folders.model / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    with safe_open(folders.model / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    tops = {".".join(name.split(".")[:2]) for name in stored}
    assert tops == {
        "language_model.lm_head",
        "language_model.model",
        "multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
        "vision_tower.vision_model",
    }
    model = AutoModelForImageTextToText.from_pretrained(folders.model)
    loaded = {published_name(name): weight for name, weight in model.state_dict().items()}
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)
    assert sum(folders.parameters[part] for part in ("vision", "language")) == sum(
        p.numel() for p in model.parameters()
    )
    processor = AutoProcessor.from_pretrained(folders.model)
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    text = processor.apply_chat_template(message(tiny.question), add_generation_prompt=True)
    inputs = processor(images=[picture(0, folders.side)], text=text, return_tensors="pt")
    ids = inputs["input_ids"][0]
    assert int((ids == model.config.image_token_id).sum()) == folders.image_tokens == 576
    assert processor.tokenizer.unk_token_id not in ids
    assert len(processor.tokenizer(question(tiny.question), add_special_tokens=False)["input_ids"]) == 8


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_they_say(name: str) -> None:
    preset = PRESETS[name]
    config = preset.config()
    assert preset.options[:2] == ("--dtype", preset.dtype)
    assert {load.concurrency for load in preset.loads} == {1, 4, 16}
    vision = config.vision_config
    assert (vision.image_size // vision.patch_size) ** 2 == 576
    assert preset.rounds >= 2
    assert min(load.requests for load in preset.loads) >= 10
    small = rehearsal(preset)
    assert (small.note, small.gpu_bytes, small.dtype) != (None, preset.gpu_bytes, preset.dtype)
    assert {load.concurrency for load in small.loads} == {1, 4, 16}
    assert preset.config().get_text_config().num_hidden_layers > 2  # a rehearsal leaves it alone


def test_the_small_model_has_the_size_it_should() -> None:
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(PRESETS["cpu-small"].config())
    language = sum(p.numel() for p in model.model.language_model.parameters())
    assert language / 1e6 == pytest.approx(92, abs=1)


def test_no_two_requests_show_the_same_picture(tiny: Preset) -> None:
    loads = [Load(1, 3), Load(4, 3)]
    sent = [one for load in loads for series in (0, 1) for one in bodies(tiny, 32, load, series)]
    assert len(set(sent)) == len(sent) == 12
    assert sent[:3] == bodies(tiny, 32, loads[0], 0)
    most = max(load.requests for preset in PRESETS.values() for load in preset.loads)
    assert most < 1000  # a series has a thousand numbers


def test_a_request_holds_its_picture_and_its_question() -> None:
    shown = picture(5, 40)
    asked = json.loads(body(shown, 6, 4, mark="again"))
    image, text = asked["messages"][0]["content"]
    sent = Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].partition(",")[2])))
    assert ImageChops.difference(sent.convert("RGB"), shown).getbbox() is None
    assert (image["uuid"], text["text"], asked["max_tokens"]) == ("again", question(6), 4)
    assert "uuid" not in json.loads(body(shown, 6, 4))["messages"][0]["content"][0]
    assert message(6)[0]["content"][1] == text


# ------------------------------------------------------------------------------------------- the gate

THOSE = contenders(64, Path("pruner"))
#: What servers would answer: two pictures, each twice in a row.
RIGHT = {
    UNPRUNED: Answered([(1, 1), (1, 1), (2, 2), (2, 2)], [586] * 4),
    WITH_PRUNER: Answered([(3, 3), (3, 3), (2, 2), (2, 2)], [74] * 4),
    BY_RULE: Answered([(4, 4), (4, 4), (5, 5), (5, 5)], [74] * 4),
}
ASKED = Questions([b""] * 4, 586, {name: one.tokens[::2] for name, one in RIGHT.items()})


def checked(asked: Questions = ASKED, **wrong: Answered) -> list[str]:
    came = {**RIGHT, **{THOSE[int(number[1:])].name: one for number, one in wrong.items()}}
    return gate.check(asked, THOSE, 576, lambda contender, bodies: came[contender.name])


def test_the_gate_lets_right_servers_pass() -> None:
    assert len(checked()) == 3
    assert "all greedy tokens are those of ocvtp.apply" in checked()[-1]
    half = dataclasses.replace(ASKED, answers={})
    assert len(checked(half)) == 2
    assert len(checked(half, _1=Answered([(9, 9), (9, 9), (2, 2), (2, 2)], [74] * 4))) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"_1": Answered(RIGHT[WITH_PRUNER].tokens, [586] * 4)}, r"counts \[586\] tokens in prompts of 74"),
        ({"_2": Answered(RIGHT[BY_RULE].tokens, [74, 74, 74, 73])}, r"counts \[73, 74\] tokens"),
        (
            {"_0": Answered([(1, 1), (1, 2), (2, 2), (2, 2)], [586] * 4)},
            "differ when a picture is sent again",
        ),
        ({"_1": Answered([(3, 3), (3, 3), (2, 1), (2, 1)], [74] * 4)}, "the server answers .* transformers"),
    ],
)
def test_the_gate_finds_what_is_wrong(wrong: dict[str, Answered], message: str) -> None:
    with pytest.raises(GateError, match=message):
        checked(**wrong)


def test_a_gate_that_can_tell_nothing_is_none() -> None:
    half = dataclasses.replace(ASKED, answers={})
    with pytest.raises(GateError, match="they tell nothing"):
        checked(half, _1=Answered(RIGHT[UNPRUNED].tokens, [74] * 4))


def test_transformers_answers_what_servers_must(folders: Folders, tiny: Preset) -> None:
    those = contenders(tiny.keep, folders.pruner)
    asked = gate.questions(tiny, folders, those)
    assert asked.prompt_tokens == 586
    assert {name: [len(one) for one in answers] for name, answers in asked.answers.items()} == {
        contender.name: [tiny.answer] * 3 for contender in those
    }
    assert asked.answers[UNPRUNED] != asked.answers[WITH_PRUNER]
    assert len(set(map(tuple, asked.answers.values()))) == 3
    half = gate.questions(dataclasses.replace(tiny, dtype="bfloat16"), folders, those)
    assert (half.answers, half.bodies) == ({}, asked.bodies)
