"""``ocvtp features``: what it says, what it stores, what it refuses before anything slow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ocvtp.training.features import ImageFeatures
from ocvtp.training.store import INDEX, FeatureStore
from tests.cli.conftest import Files
from tests.cli.test_commands import run
from tests.training.pictures import BROKEN, contents, good_pictures, mixed_pictures

GOOD = 9  # every picture that can be decoded and is no copy: this encoder makes finite features of all


@pytest.fixture
def arguments(files: Files, tmp_path: Path) -> list[str]:
    """Pictures with everything wrong in them, a LLaVA's tower, and a folder that is not there yet."""
    images = mixed_pictures(tmp_path / "images")
    given = [images, "--encoder", files.model, "--layer", 2, "--out", tmp_path / "out", "--device", "cpu"]
    return [str(value) for value in given]


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake must be found before weights are loaded."""
    monkeypatch.setattr("ocvtp.training.encoder._load", lambda *_: pytest.fail("an encoder was loaded first"))


def changed(arguments: list[str], **changes: Any) -> list[str]:
    """With another value after ``--name``, or another ``images``."""
    given = list(arguments)
    for name, value in changes.items():
        if name == "images":
            given[0] = str(value)
        else:
            given[given.index(f"--{name}") + 1] = str(value)
    return given


def test_stores_and_says_so(arguments: list[str], files: Files, tmp_path: Path) -> None:
    said = run("features", *arguments, "--crops", "2", "--batch", "3")
    store = FeatureStore(tmp_path / "out", verify=True)
    assert len(store) == 2 * GOOD
    assert (store.tokens, store.width, store.layer) == (16, 64, 2)
    assert f"{2 * GOOD} new records at " in said
    assert " a second" in said
    assert "1 files have the content of another" in said
    assert "3 files were skipped" in said
    assert all(f"{name} can't be decoded as an image" in said for name in BROKEN)
    assert "Loading weights" not in said
    assert "assumed" not in said
    before = contents(tmp_path / "out")
    assert f"holds all {2 * GOOD} records" in run("features", *arguments, "--crops", "2")
    assert contents(tmp_path / "out") == before
    from ocvtp.training.encoder import FeatureEncoder

    fresh = ImageFeatures(tmp_path / "images", FeatureEncoder(str(files.model), 2), 2)
    assert fresh.fingerprint == store.fingerprint
    assert fresh.images == store.images


def test_no_more_than_ten_bad_ones(arguments: list[str], tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / "images" / f"bad{i:02d}.png").write_text(f"no picture {i}")
    said = run("features", *arguments)
    assert "23 files were skipped" in said
    assert said.count("can't be decoded") == 10
    assert "and 13 more" in said
    assert len(json.loads((tmp_path / "out" / INDEX).read_text())["bad"]) == 23


def test_an_encoder_without_a_processor(arguments: list[str], files: Files, tmp_path: Path) -> None:
    bare = shutil.copytree(files.model, tmp_path / "bare")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (bare / name).unlink(missing_ok=True)
    said = run("features", *changed(arguments, encoder=bare), "--limit", "3")
    assert "has no image processor: images are squashed to 56 x 56" in " ".join(said.split())
    # what was made with the processor can't be mixed with it
    said = run("features", *arguments, code=2)
    assert "features of another encoder (different preprocessing)" in said


@pytest.mark.usefixtures("no_encoder")
class TestMistakes:
    @pytest.mark.parametrize(
        ("flag", "value"),
        [
            ("--crops", 0),
            ("--batch", 0),
            ("--limit", 0),
            ("--shard-mb", 0),
            ("--layer", -1),
            ("--batch", "x"),
        ],
    )
    def test_numbers(self, arguments: list[str], flag: str, value: object) -> None:
        assert flag in run("features", *arguments, flag, str(value), code=2)

    def test_device_and_dtype(self, arguments: list[str]) -> None:
        assert "unknown device 'tpu'" in run("features", *arguments, "--device", "tpu", code=2)
        assert "unknown dtype 'int8'" in run("features", *arguments, "--dtype", "int8", code=2)

    def test_layer(self, arguments: list[str]) -> None:
        said = run("features", *changed(arguments, layer=6), code=2)
        assert "--layer must be between 0 and 5" in said
        assert said.count("\n") == 1

    def test_images(self, arguments: list[str], tmp_path: Path) -> None:
        assert "no folder at" in run("features", *changed(arguments, images=tmp_path / "no"), code=2)
        (tmp_path / "empty").mkdir()
        assert "no images in" in run("features", *changed(arguments, images=tmp_path / "empty"), code=2)
        file = tmp_path / "images" / "picture00.png"
        assert "give the folder that holds" in run("features", *changed(arguments, images=file), code=2)

    def test_encoder(self, arguments: list[str], files: Files, tmp_path: Path) -> None:
        def said(encoder: object) -> str:
            return run("features", *changed(arguments, encoder=encoder), code=2)

        assert "--encoder is empty" in said("")
        assert "no model folder at" in said(tmp_path / "nowhere")
        assert "holds a pruner, not a model" in said(files.pruner)
        assert "--encoder takes the folder" in said(files.model / "config.json")
        (tmp_path / "llm").mkdir()
        (tmp_path / "llm" / "config.json").write_text('{"model_type": "llama"}')
        assert "is a 'llama' model without a patch_size" in said(tmp_path / "llm")

    def test_out(self, arguments: list[str], tmp_path: Path) -> None:
        assert "is a file; give a folder" in run(
            "features", *changed(arguments, out=tmp_path / "images" / "zero.gif"), code=2
        )
        assert "holds other things" in run("features", *changed(arguments, out=tmp_path / "images"), code=2)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / INDEX).write_text('{"schema": 0}')
        said = run("features", *arguments, code=2)
        assert "was not written by this version of ocvtp (schema 0, not 2)" in said
        assert "make the features again" in said


def test_mistakes_that_show_later(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").touch()
    assert "none of the 1 images" in run("features", *arguments, code=2)
    good_pictures(tmp_path / "images", 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert "No space left on device" in run("features", *arguments, code=2)
    monkeypatch.undo()
    assert "1 new records" in run("features", *arguments)
    assert "(different layer)" in run("features", *changed(arguments, layer=1), code=2)
    assert "(different dtype)" in run("features", *arguments, "--dtype", "bfloat16", code=2)
