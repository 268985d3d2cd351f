"""``ocvtp train``: from stored features, from images, from a config file; and what it refuses at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from ocvtp import OCPruner
from ocvtp.cli import app
from ocvtp.training.log import read_metrics
from ocvtp.training.store import INDEX, Index, Record, write_shard
from tests.cli.conftest import Files
from tests.training.fake import Fake

TINY = {
    "pruner": {"decoder_layers": 1, "slot_dim": 16, "hidden_dim": 16, "ffn_dim": 16, "decoder_ffn_dim": 16}
}
RECIPE = {"batch_size": 4, "slots": [2, 4], "warmup_epochs": 1, "validation_share": 0.2}


def ocvtp(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments), "--device", "cpu"])


def error_of(result: Result) -> str:
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


@pytest.fixture
def features(tmp_path: Path) -> Path:
    folder, source = tmp_path / "features", Fake()
    folder.mkdir()
    index = Index(source.fingerprint, {}, source.layer, source.tokens, source.width)
    for number, first in enumerate((0, 20)):
        records = [Record(source.images[i], f"{i}.png", i % 2) for i in range(first, first + 20)]
        index.shards.append(write_shard(folder, number, source.batch(range(first, first + 20)), records))
    index.write(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY, "recipe": RECIPE}))
    return path


def test_trains_from_stored_features(features: Path, config: Path, tmp_path: Path) -> None:
    arguments = ("--features", features, "--config", config, "--out", tmp_path / "run", "--epochs", 2)
    result = ocvtp(*arguments)
    assert result.exit_code == 0, result.output
    assert "all epochs done: 16 steps, best validation loss" in result.stderr
    pruner = OCPruner.from_pretrained(tmp_path / "run" / "pruner")
    assert (pruner.config.in_dim, pruner.config.slot_dim, pruner.config.layer) == (16, 16, 3)
    slots = {row["slots"] for row in read_metrics(tmp_path / "run") if row["kind"] == "train"}
    assert slots <= {2, 4}
    assert "finished before, after 16 steps" in ocvtp(*arguments).stderr


def test_trains_from_images(files: Files, config: Path, tmp_path: Path) -> None:
    from PIL import Image

    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for i in range(3):
        pixels = torch.randint(
            255, (40, 50, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8
        )
        Image.fromarray(pixels.numpy()).save(photographs / f"{i}.png")
    encoder = ("--images", photographs, "--encoder", files.model, "--layer", 2, "--crops", 3)
    result = ocvtp(*encoder, "--config", config, "--out", tmp_path / "run", "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert OCPruner.from_pretrained(tmp_path / "run" / "pruner").config.layer == 2


def test_options_win_over_the_file(features: Path, config: Path, tmp_path: Path) -> None:
    arguments = ("--features", features, "--config", config, "--out", tmp_path / "run")
    result = ocvtp(*arguments, "--epochs", 1, "--slots", "3", "--batch-size", 8, "--learning-rate", 0.5)
    assert result.exit_code == 0, result.output
    rows = read_metrics(tmp_path / "run")
    assert rows[-1]["step"] == 4
    assert rows[0]["slots"] == 3
    assert max(row["learning_rate"] for row in rows if row["kind"] == "train") == 0.5


def test_every_epoch_is_told_and_a_run_can_be_forgotten(features: Path, config: Path, tmp_path: Path) -> None:
    arguments = ("--features", features, "--config", config, "--out", tmp_path / "run")
    shares = ("--validation-share", 0.5, "--patience", 1)
    said = ocvtp(*arguments, "--epochs", 2, *shares).stderr
    assert "epoch 1 of 2: loss " in said
    assert "(best), live slots " in said
    assert read_metrics(tmp_path / "run")[-1]["step"] <= 2 * 5  # half of 40 records, in batches of 4
    assert "recipe.patience was 1, is 5" in error_of(ocvtp(*arguments, "--epochs", 2))
    again = ocvtp(*arguments, "--epochs", 1, "--fresh")
    assert again.exit_code == 0, again.output
    assert read_metrics(tmp_path / "run")[-1]["step"] == 8


def test_validation_features(features: Path, config: Path, tmp_path: Path) -> None:
    arguments = ("--features", features, "--config", config, "--out", tmp_path / "run", "--epochs", 1)
    said = error_of(ocvtp(*arguments, "--validation-features", features))
    assert "20 photographs are in both" in said


class TestRefused:
    def test_no_source(self, tmp_path: Path) -> None:
        assert "give either --features" in error_of(ocvtp("--out", tmp_path / "run"))

    def test_two_sources(self, tmp_path: Path) -> None:
        both = ("--features", tmp_path, "--images", tmp_path, "--out", tmp_path / "run")
        assert "give either --features" in error_of(ocvtp(*both))

    def test_images_without_an_encoder(self, tmp_path: Path) -> None:
        assert "--images needs --encoder" in error_of(ocvtp("--images", tmp_path, "--out", tmp_path / "run"))

    def test_no_features_there(self, tmp_path: Path) -> None:
        said = error_of(ocvtp("--features", tmp_path, "--out", tmp_path / "run"))
        assert "has no index.json" in said
        assert "ocvtp features" in said

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ("{", "can't be read as JSON"),
            ("[]", "it must be a JSON object; got []"),
            ('{"epochs": 3}', "unknown field(s) 'epochs'; there are: recipe, pruner"),
            ('{"optimizer": {}}', "unknown field(s) 'optimizer'"),
            ('{"recipe": 3}', "recipe must be an object; got 3"),
            ('{"recipe": {"lr": 1}}', "Recipe: unknown field(s) 'lr'; there are: epochs"),
            ('{"pruner": {"width": 1}}', "PrunerConfig: unknown field(s) 'width'; there are: in_dim"),
            ('{"recipe": {"clip": -1}}', "Recipe.clip must be a number above 0"),
            ('{"recipe": {"slots": 16}}', "Recipe.slots must be a list; got 16"),
            ('{"recipe": {"slots": null}}', "Recipe.slots must be a list; got None"),
            ('{"recipe": {"clip": NaN}}', "NaN is no number"),
            ('{"recipe": {"clip": 1, "clip": 2}}', "clip is in it twice"),
            ('{"pruner": {"slot_dim": 1000000000}}', "PrunerConfig.slot_dim must be an int"),
            ('{"pruner": {"decoder_layers": 1000000}}', "PrunerConfig.decoder_layers must be an int"),
            (f'{{"pruner": {{"slot_dim": {10**400}}}}}', "got an int of 1329 bits"),
            ("[" * 10**5, "nested too deeply"),
        ],
    )
    def test_config_files(self, features: Path, tmp_path: Path, content: str, match: str) -> None:
        (tmp_path / "bad.json").write_text(content)
        arguments = ("--features", features, "--config", tmp_path / "bad.json", "--out", tmp_path / "run")
        assert match in error_of(ocvtp(*arguments))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (("--slots", "16;32"), "--slots takes numbers with commas"),
            (("--slots", "64"), "slots [64] are more than the 12 tokens"),
            (("--autocast", "int8"), "autocast"),
            (("--batch-size", "1000"), "fewer than a batch of 1000"),
            (("--patience", "0"), "patience"),
        ],
    )
    def test_options(self, features: Path, tmp_path: Path, options: tuple[str, ...], match: str) -> None:
        assert match in error_of(ocvtp("--features", features, "--out", tmp_path / "run", *options))

    def test_damaged_features(self, features: Path, config: Path, tmp_path: Path) -> None:
        """A flipped bit and swapped files are found before anything is trained, metadata too."""
        arguments = ("--features", features, "--config", config, "--out", tmp_path / "run")
        one, other = (features / f"features-{i:05d}.safetensors" for i in range(2))
        whole = one.read_bytes()
        one.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert f"{one} is damaged: its checksum is not the index's" in error_of(ocvtp(*arguments))
        one.write_bytes(other.read_bytes())
        other.write_bytes(whole)
        assert f"{one} is damaged" in error_of(ocvtp(*arguments))
        index = features / INDEX
        index.write_text(index.read_text().replace('"layer": 3', '"layer": 4'))
        said = error_of(ocvtp(*arguments))
        assert f"{index}: layer is not what was written: changed or damaged; copy it back" in said
        assert not (tmp_path / "run").exists()

    def test_an_altered_run(self, features: Path, config: Path, tmp_path: Path) -> None:
        arguments = ("--features", features, "--config", config, "--out", tmp_path / "run", "--epochs", 1)
        assert ocvtp(*arguments).exit_code == 0
        (tmp_path / "run" / "loss.png").unlink(missing_ok=True)
        (tmp_path / "run" / "loss.png").mkdir()
        assert "loss.png is no file, and a run keeps one there; move it away" in error_of(ocvtp(*arguments))
        (tmp_path / "run" / "loss.png").rmdir()
        about = tmp_path / "run" / "pruner" / "config.json"
        about.write_text(about.read_text().replace('"layer": 3', '"layer": 4'))
        said = error_of(ocvtp(*arguments))
        assert f"{about} is not what was written: changed or damaged; copy it back" in said
        assert ocvtp(*arguments, "--fresh").exit_code == 0

    def test_a_full_disk(
        self, features: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", full)
        arguments = ("--features", features, "--config", config, "--out", tmp_path / "run")
        assert "No space left on device" in error_of(ocvtp(*arguments))

    def test_a_run_with_other_settings(self, features: Path, config: Path, tmp_path: Path) -> None:
        arguments = ("--features", features, "--config", config, "--out", tmp_path / "run")
        assert ocvtp(*arguments, "--epochs", 1).exit_code == 0
        assert "recipe.epochs was 1, is 2" in error_of(ocvtp(*arguments, "--epochs", 2))

    def test_divergence_is_told_plainly(self, features: Path, config: Path, tmp_path: Path) -> None:
        arguments = ("--features", features, "--config", config, "--out", tmp_path / "run")
        said = error_of(ocvtp(*arguments, "--epochs", 3, "--learning-rate", 1e30))
        assert "NaN or infinite in step" in said
