"""Packed questions are answered as if each stood alone, and what every patch is said to show is there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.testbed.examples import example
from bench.testbed.language import VOCABULARY, build_processor, prompt
from bench.testbed.model import Size, build
from bench.testbed.network import DenseHead, answer, judge, see
from bench.testbed.packing import DENSE, pack

SMALL = Size(width=48, layers=2, heads=3, text_width=32, text_layers=2, text_heads=2)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build(SMALL).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor(SMALL.side, SMALL.patch)


@torch.no_grad()
def test_packed_logits_are_those_of_single_prompts(model: Any, processor: Any) -> None:
    examples = [example("test", 0, 5), example("test", 1, 2), example("test", 2, 8)]
    batch = pack(examples, VOCABULARY, SMALL, [1.0] * 3)
    packed = answer(model, model.model.multi_modal_projector(see(model, batch.pixels)), batch)
    questions = [(row, question) for row, one in enumerate(examples) for question in one.questions]
    assert len(questions) == len(batch.answers) == 15
    for (row, question), (at, column), kind in zip(
        questions, batch.answers.tolist(), batch.kinds, strict=True
    ):
        image = Image.fromarray(examples[row].pixels)
        inputs = processor(images=image, text=prompt(question.text), return_tensors="pt")
        alone = model(**inputs).logits[0, -1]
        assert (at, kind) == (row, question.kind)
        torch.testing.assert_close(packed[row, column], alone, rtol=1e-4, atol=1e-5)
        assert batch.targets[row, column] == VOCABULARY[question.answer]


@torch.no_grad()
@pytest.mark.parametrize("side", [128, 192])
def test_pixels_are_the_processors(side: int) -> None:
    one = example("test", 3, 1)
    batch = pack([one], VOCABULARY, Size(side=side), [1.0])
    processor = build_processor(side, 8)
    made = processor.image_processor(images=Image.fromarray(one.pixels), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch.pixels, made, rtol=0, atol=1e-5)


@torch.no_grad()
def test_stretched_positions_are_those_of_fewer_tokens(model: Any) -> None:
    """A quarter of the distance: question and picture are as near as with a quarter of the tokens."""
    batch = pack([example("test", 0, 3)], VOCABULARY, SMALL, [0.25])
    seen: dict[str, torch.Tensor] = {}

    def spy(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        seen["positions"] = arguments["position_ids"]

    handle = model.model.language_model.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        answer(model, model.model.multi_modal_projector(see(model, batch.pixels)), batch)
    finally:
        handle.remove()
    positions = seen["positions"][0]
    torch.testing.assert_close(positions[:4], torch.tensor([0.0, 1.0, 1.25, 1.5]))
    assert positions[257] == 65
    assert positions[258] == 66


@torch.no_grad()
def test_without_a_picture_only_the_question_counts(model: Any) -> None:
    examples = [example("test", 0, 4)]
    batch = pack(examples, VOCABULARY, SMALL, [1.0])
    blind = answer(model, None, batch)
    batch.pixels.zero_()
    torch.testing.assert_close(answer(model, None, batch), blind)
    ids = [VOCABULARY["<s>"], *batch.ids[0, batch.segments[0] == 0].tolist()]
    alone = model(input_ids=torch.tensor([ids])).logits[0, 1:]
    torch.testing.assert_close(blind[0, : len(ids) - 1], alone, rtol=1e-4, atol=1e-5)


def test_patches_are_told_what_they_show() -> None:
    one = example("test", 7, 1)
    batch = pack([one], VOCABULARY, SMALL, [1.0])
    for row, column in ((r, c) for r in range(16) for c in range(16)):
        pixels = one.owner[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        counts = [(pixels == i).sum() for i in range(len(one.scene.things))]
        token = row * 16 + column
        if max(counts) < 4:
            assert all(batch.labels[name][0, token] == len(DENSE[name]) for name in DENSE)
            continue
        thing = one.scene.things[int(np.argmax(counts))]
        assert DENSE["color"][batch.labels["color"][0, token]] == thing.color
        assert DENSE["size"][batch.labels["size"][0, token]] == thing.size
        assert batch.labels["column"][0, token] == thing.x // 16
        assert batch.labels["row"][0, token] == thing.y // 16
        expected = [(thing.x - 64) / 32, (thing.y - 64) / 32, np.log(thing.radius)]
        np.testing.assert_allclose(batch.places[0, token], expected, atol=1e-5)


def test_larger_pictures_have_more_patches_that_show_the_same() -> None:
    one = example("test", 7, 1)
    fine = pack([one], VOCABULARY, Size(side=256), [1.0])
    coarse = pack([one], VOCABULARY, Size(side=128), [1.0])
    large, small = (
        batch.labels["color"][0].reshape(grid, grid) for batch, grid in ((fine, 32), (coarse, 16))
    )
    on_something = large.reshape(16, 2, 16, 2).amin((1, 3)) < len(DENSE["color"])
    assert (on_something >= (small < len(DENSE["color"]))).all()


def test_a_batch_without_questions_trains_the_tower_alone(model: Any) -> None:
    batch = pack([example("test", 0, 0)], VOCABULARY, SMALL, [1.0])
    head = DenseHead(SMALL.width)
    outcome = judge(model, head, batch, 1.0)
    assert set(outcome.parts) == {"dense"}
    outcome.loss.backward()
    with_gradient = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"vision_tower"}
    model.zero_grad()


def test_right_and_wrong_are_told_apart(model: Any) -> None:
    batch = pack([example("test", 0, 6)], VOCABULARY, SMALL, [1.0])
    with torch.no_grad():
        picture = model.model.multi_modal_projector(see(model, batch.pixels))
        row, column = batch.answers.T
        said = answer(model, picture, batch)[row, column].argmax(-1)
        outcome = judge(model, None, batch, 0.0)
        assert outcome.correct.tolist() == (said == batch.targets[row, column]).tolist()
        batch.targets[row, column] = said
        assert judge(model, None, batch, 0.0).correct.all()
