"""Scenes and questions: answers recomputed from the words by another route, splits, balance, determinism."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from bench.testbed import examples as made
from bench.testbed.examples import example
from bench.testbed.language import WORDS, build_tokenizer
from bench.testbed.paint import paint
from bench.testbed.questions import KINDS, Question, ask
from bench.testbed.scenes import COLORS, HELD_OUT, SHAPE_NAMES, SIDE, SIZES, TEXTURES, Scene, Thing, sample

SPLITS = ("train", "validation", "test", "unseen")
PLURALS = {name + ("es" if name == "cross" else "s"): name for name in (*SHAPE_NAMES, "thing")}


@pytest.fixture
def no_paint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions do not depend on pixels, and painting takes most of the time."""
    blank = np.zeros((SIDE, SIDE, 3), np.uint8), np.full((SIDE, SIDE), -1, np.int8)
    monkeypatch.setattr(made, "paint", lambda scene: blank)


def described(words: str, scene: Scene) -> list[Thing]:
    """Things that answer to a description, word by word."""
    things = list(scene.things)
    for word in words.split():
        word = PLURALS.get(word, word)
        if word == "thing":
            continue
        for name, values in (
            ("color", COLORS),
            ("shape", SHAPE_NAMES),
            ("texture", TEXTURES),
            ("size", tuple(SIZES)),
        ):
            if word in values:
                things = [thing for thing in things if getattr(thing, name) == word]
                break
        else:
            raise AssertionError(f"{word!r} describes nothing")
    return things


def one(words: str, scene: Scene) -> Thing:
    things = described(words, scene)
    assert len(things) == 1, f"{words!r} fits {len(things)} things"
    return things[0]


def place(thing: Thing) -> str:
    rows = "top" if thing.y < SIDE / 3 else "bottom" if thing.y > 2 * SIDE / 3 else ""
    columns = "left" if thing.x < SIDE / 3 else "right" if thing.x > 2 * SIDE / 3 else ""
    return "-".join(filter(None, (rows, columns))) or "center"


def true_answer(text: str, scene: Scene) -> str:
    """Read the question as a person would."""
    if found := re.fullmatch(r"what color is the (.*)\?|what is the color of the (.*)\?", text):
        return one(found[1] or found[2], scene).color
    if found := re.fullmatch(r"what shape is the (.*)\?|what is the shape of the (.*)\?", text):
        return one(found[1] or found[2], scene).shape
    if found := re.fullmatch(r"(?:is there|can you see) a (.*)\?", text):
        return "yes" if described(found[1], scene) else "no"
    if found := re.fullmatch(r"how many (.*) (?:are there|can you see)\?", text):
        return str(len(described(found[1], scene)))
    if found := re.fullmatch(r"(?:where|in which part of the picture) is the (.*)\?", text):
        return place(one(found[1], scene))
    if found := re.fullmatch(r"is the (.*) (left of|right of|above|below) the (.*)\?", text):
        a, b = one(found[1], scene), one(found[3], scene)
        differences = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
        return "yes" if differences[found[2]] > 0 else "no"
    if found := re.fullmatch(r"is the (.*) (larger|smaller) than the (.*)\?", text):
        a, b = one(found[1], scene), one(found[3], scene)
        return "yes" if (a.radius > b.radius) == (found[2] == "larger") else "no"
    if text == "what letter is in the picture?":
        (letter,) = [thing.letter for thing in scene.things if thing.letter]
        return letter
    if found := re.fullmatch(r"(?:what|which) letter is (?:written )?on the (.*)\?", text):
        letter = one(found[1], scene).letter
        assert letter
        return letter
    raise AssertionError(f"nobody understands {text!r}")


@pytest.mark.usefixtures("no_paint")
@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_true(split: made.Split) -> None:
    for index in range(250):
        drawn = example(split, index, 12)
        for question in drawn.questions:
            assert question.answer == true_answer(question.text, drawn.scene), question


@pytest.mark.usefixtures("no_paint")
def test_answers_are_words_and_questions_do_not_repeat() -> None:
    tokenizer = build_tokenizer()
    for split in SPLITS:
        for index in range(100):
            drawn = example(split, index, 12)
            texts = [question.text for question in drawn.questions]
            assert len(set(texts)) == len(texts)
            for question in drawn.questions:
                assert question.answer in WORDS
                assert tokenizer.unk_token_id not in tokenizer(question.text)["input_ids"]


@pytest.mark.usefixtures("no_paint")
def test_held_out_pairs_are_neither_shown_nor_spoken_of_but_in_their_split() -> None:
    pairs = [f"{color} {shape}" for color, shape in HELD_OUT]
    assert len(pairs) == len({color for color, _ in HELD_OUT}) == 8
    for split in ("train", "validation", "test"):
        for index in range(300):
            drawn = example(split, index, 12)
            assert not {(thing.color, thing.shape) for thing in drawn.scene.things} & HELD_OUT
            for question in drawn.questions:
                assert not any(pair in question.text for pair in pairs), question


@pytest.mark.usefixtures("no_paint")
def test_the_unseen_split_is_about_unseen_pairs() -> None:
    """Every question is about such a thing, or says there is none of a pair, which need not be a no."""
    pairs = [f"{color} {shape}" for color, shape in HELD_OUT]
    said: Counter[str] = Counter()
    for index in range(300):
        drawn = example("unseen", index, 8)
        for question in drawn.questions:
            things = [drawn.scene.things[i] for i in question.targets]
            if question.answer in ("no", "0") and not things:
                assert any(pair in question.text for pair in pairs), question
            else:
                assert any((thing.color, thing.shape) in HELD_OUT for thing in things), question
            if question.kind == "existence" and any(pair in question.text for pair in pairs):
                said[question.answer] += 1
    assert min(said["yes"], said["no"]) > 40


@pytest.mark.usefixtures("no_paint")
def test_splits_share_no_scene() -> None:
    seen: dict[Scene, str] = {}
    for split in SPLITS:
        for index in range(200):
            assert seen.setdefault(example(split, index, 0).scene, split) == split


@pytest.mark.usefixtures("no_paint")
def test_no_kind_and_no_answer_dominates() -> None:
    kinds: Counter[str] = Counter()
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(600):
        for question in example("test", index, 8).questions:
            kinds[question.kind] += 1
            answers[question.kind][question.answer] += 1
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) > 0.4 * max(kinds.values())
    for kind, most in (
        ("existence", 0.57),
        ("relation", 0.57),
        ("size", 0.57),
        ("count", 0.3),
        ("color", 0.2),
    ):
        assert max(answers[kind].values()) < most * kinds[kind], (kind, answers[kind])
    for kind in ("shape", "position", "reading"):
        assert max(answers[kind].values()) < 0.2 * kinds[kind], (kind, answers[kind])


@pytest.mark.usefixtures("no_paint")
def test_the_same_questions_on_any_machine() -> None:
    """Published figures are of these: whoever changes them has to measure anew."""
    texts = [
        f"{question.text} {question.answer}"
        for split in SPLITS
        for index in range(20)
        for question in example(split, index, 8).questions
    ]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "d1c2c41c7b6cff94"


def test_pixels_are_the_same_every_time_and_show_every_thing() -> None:
    for index in range(20):
        first, second = example("test", index, 1), example("test", index, 8)
        np.testing.assert_array_equal(first.pixels, second.pixels)
        for number, thing in enumerate(first.scene.things):
            area = (first.owner == number).sum()
            assert 0.2 * thing.radius**2 < area < 3.3 * thing.radius**2, thing
            rows, columns = np.nonzero(first.owner == number)
            assert abs(columns.mean() - thing.x) < 0.5 * thing.radius
            assert abs(rows.mean() - thing.y) < 0.5 * thing.radius


def test_letters_are_painted_upright_on_plain_things() -> None:
    bare = Thing("square", "yellow", "plain", "large", 64.0, 64.0, 15.0, 0.0)
    lettered = Thing("square", "yellow", "plain", "large", 64.0, 64.0, 15.0, 0.0, letter="L")
    difference = np.abs(
        paint(Scene((lettered,), 5))[0].astype(int) - paint(Scene((bare,), 5))[0].astype(int)
    ).sum(axis=2)
    rows, columns = np.nonzero(difference > 100)
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (14, 10)
    assert difference[rows.max(), columns.max()] > 100  # the foot of the L
    assert difference[rows.min(), columns.max()] == 0
    for index in range(200):
        for thing in sample(np.random.default_rng(index)).things:
            assert not thing.letter or (thing.texture == "plain" and thing.turn == 0 and thing.size != "tiny")


def test_a_kind_that_a_scene_does_not_allow() -> None:
    scene = Scene((Thing("star", "red", "plain", "large", 40.0, 40.0, 14.0, 0.0),), 0)
    rng = np.random.default_rng(0)
    assert ask(scene, rng, "reading", [0]) is None
    assert ask(scene, rng, "relation", [0]) is None
    asked = ask(scene, rng, "color", [0])
    assert isinstance(asked, Question)
    assert asked.answer == "red"


@pytest.mark.parametrize(("split", "index"), [("training", 0), ("test", -1)])
def test_pictures_that_there_are_not(split: made.Split, index: int) -> None:
    with pytest.raises(ValueError, match=r"no picture .* splits: train, validation, test, unseen"):
        example(split, index, 1)
