"""The demo's first part: a trained model answers about its scenes, or about what the user brings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ocvtp
from ocvtp.commands import answers, demo
from ocvtp.commands.errors import UserError
from tests.cli.test_commands import run

ASSETS = answers.find_assets()


def silent(**options: object) -> answers.Answers:
    from rich.console import Console

    assert ASSETS is not None
    settings = {"share": 1 / 9, "image": None, "question": None, **options}
    return answers.run(ASSETS, console=Console(quiet=True), **settings)


def test_answers_about_the_scenes_mean_something(tmp_path: Path) -> None:
    found = silent(out=tmp_path)
    assert len(found.asked) == 48
    assert (found.tokens, found.keep) == (256, 28)
    before = sum(one.before == one.expected for one in found.asked)
    after = sum(one.after == one.expected for one in found.asked)
    assert before >= 44  # 46 when it was shipped, and as many after
    assert after >= 42
    assert sum(one.standing == one.expected for one in found.asked) >= 44
    assert len(found.before) == len(found.after) == len(found.standing)
    with Image.open(tmp_path / "answers.png") as picture:
        assert picture.width > 1000


def test_keeping_everything_changes_no_answer(tmp_path: Path) -> None:
    assert all(one.before == one.after == one.standing for one in silent(out=tmp_path, share=1.0).asked)


def test_every_way_has_its_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shown is what each way said, and the ways are those that the columns name."""
    said: list[str] = []
    real = answers._say

    def say(model: Any, *rest: Any) -> str:
        settings = ocvtp.vlm.patch._settings_of(model)
        how = "all" if settings is None else f"{settings.merge}-{settings.weigh}"
        said.append(how)
        real(model, *rest)
        return how

    monkeypatch.setattr(answers, "_say", say)
    shown = run("demo", "--question", "where is the circle?", "--out", tmp_path)
    assert said == ["all", "off-False", "projected-True"]
    (row,) = (line for line in shown.splitlines() if "where is the circle?" in line)
    assert [cell.strip() for cell in row.split("│")[2:5]] == said
    assert "28 that stand for all" in shown


def test_a_picture_and_a_question_of_ones_own(tmp_path: Path) -> None:
    canvas = np.full((256, 384, 3), 90, np.uint8)
    canvas[90:160, 150:220] = (220, 30, 30)
    Image.fromarray(canvas).save(tmp_path / "mine.png")
    asked = (
        "demo",
        "--image",
        tmp_path / "mine.png",
        "--question",
        "What color is the SQUARE",
        "--out",
        tmp_path,
    )
    said = run(*asked)
    assert "what color is the square?" in said
    assert "red" in said
    assert "truth" not in said
    assert "time to first token" not in said  # the large model is timed if nothing is asked
    assert (tmp_path / "answers.png").exists()


@pytest.mark.parametrize(
    "question", ["is there a unicorn?", "?", "  ", "<image> where is the circle?", "</s>"]
)
def test_words_it_does_not_know(tmp_path: Path, question: str) -> None:
    said = run("demo", "--question", question, "--out", tmp_path, code=2)
    assert "does not know" in said
    assert "top-left" in said
    assert ("'unicorn'" in said) == ("unicorn" in question)


def test_spelling_does_not_matter(tmp_path: Path) -> None:
    found = silent(out=tmp_path, question=" Where is   the circle ")
    assert [one.question for one in found.asked] == ["where is the circle?"]
    assert silent(out=tmp_path, question="can you see b").asked[0].question == "can you see B?"


def test_a_picture_needs_a_question(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "mine.png")
    assert "--image needs --question" in run("demo", "--image", tmp_path / "mine.png", code=2)
    missing = run("demo", "--image", tmp_path / "no.png", "--question", "where is the star?", code=2)
    assert "no image at" in missing


def test_without_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel has none: the times are still to be had, and a question is refused at once."""
    monkeypatch.setattr(answers, "find_assets", lambda: None)
    assert "clone the repository" in run("demo", "--question", "where is the star?", code=2)
    timed = []
    monkeypatch.setattr(demo, "run", lambda **options: timed.append(options))
    assert "left out" in run("demo", "--out", tmp_path)
    assert len(timed) == 1


def test_the_file_is_checked_before_anything_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "load_weights", lambda *_: pytest.fail("--out was not checked first"))
    (tmp_path / "answers.png").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        silent(out=tmp_path)
