"""Mistakes a person makes at the command line: one line that says what to do, before anything slow."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

import ocvtp
from bench import demo as bench_demo
from ocvtp.commands import demo
from tests.cli.conftest import Files
from tests.cli.test_commands import ASK, run

IMAGE, MODEL, PRUNER = 0, 2, 4  # where they are in Files.arguments


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake must be found before a model's weights are loaded."""
    monkeypatch.setattr(
        "transformers.AutoModelForImageTextToText.from_pretrained",
        lambda *_, **__: pytest.fail("a model was loaded before the mistake was found"),
    )


def refused(files: Files, position: int | None, value: object, *extra: object, command: str = "prune") -> str:
    """What a command says of one wrong argument; it must exit with 2."""
    arguments: list[object] = [*files.arguments, "--keep", "5"]
    if position is not None:
        arguments[position] = value
    return run(command, *map(str, [*arguments, *extra]), code=2)


@pytest.mark.usefixtures("no_model")
class TestSources:
    def test_empty(self, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(files.pruner)
        assert "--pruner is empty" in refused(files, PRUNER, "")
        monkeypatch.chdir(files.model)
        assert "--model is empty" in refused(files, MODEL, "")

    def test_a_file_as_model(self, files: Files) -> None:
        output = refused(files, MODEL, files.model / "config.json")
        assert "is a file; --model takes the folder that holds config.json" in output

    def test_swapped(self, files: Files, tmp_path: Path) -> None:
        output = refused(files, PRUNER, files.model)
        assert "holds a 'llava' model, not a pruner: are --model and --pruner swapped?" in output
        assert "holds a pruner, not a model: are --model and --pruner swapped?" in refused(
            files, MODEL, files.pruner
        )
        (tmp_path / "weights.pth").touch()
        assert "swapped?" in refused(files, MODEL, tmp_path)

    def test_pruner_misspelt_and_offline(self, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
        def download(*_: object, **__: object) -> None:
            raise LocalEntryNotFoundError("not cached") from ConnectionError("no such host")

        monkeypatch.setattr("ocvtp.pruner.hub.hf_hub_download", download)
        output = refused(files, PRUNER, "nope")
        assert "no folder 'nope' here, and the Hub can't be reached; check the spelling" in output
        assert "no such host" in output
        assert "local_files_only" not in output

    def test_pruner_misspelt_and_online(self, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
        def download(*_: object, **__: object) -> None:
            raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

        monkeypatch.setattr("ocvtp.pruner.hub.hf_hub_download", download)
        assert "no folder 'nope' here, and no such repository" in refused(files, PRUNER, "nope")

    def test_pruner_that_is_no_weights_file(self, files: Files) -> None:
        output = refused(files, PRUNER, files.image)
        assert f"{files.image} can't be read: it is no PyTorch file" in output
        assert "Give official weights" in output
        assert "weights_only" not in output

    def test_our_own_weights_file(self, files: Files) -> None:
        output = refused(files, PRUNER, files.pruner / "model.safetensors")
        assert "model.safetensors: this is ocvtp's own format: give the folder" in output

    def test_a_defective_pruner_is_named(self, files: Files, tmp_path: Path) -> None:
        state = ocvtp.OCPruner.from_pretrained(files.pruner).to_official()
        del state["aggregat.proj_k.weight"]
        torch.save(state, tmp_path / "weights.pth")
        for source in (tmp_path, tmp_path / "weights.pth"):
            output = refused(files, PRUNER, source, "--layer", 2)
            assert f"{tmp_path / 'weights.pth'}: missing key(s) ['aggregat.proj_k.weight']" in output

    def test_layer_that_the_pruner_contradicts(self, files: Files) -> None:
        output = refused(files, None, None, "--layer", 3)
        assert "reads encoder layer 2, as its config.json says, not 3" in output

    @pytest.mark.parametrize("command", ["prune", "visualize"])
    def test_layer_that_the_model_does_not_have(self, files: Files, tmp_path: Path, command: str) -> None:
        config = ocvtp.PrunerConfig(in_dim=64, hidden_dim=8, slot_dim=8, ffn_dim=8, layer=40)
        ocvtp.OCPruner(config).save_pretrained(tmp_path)
        assert "reads encoder layer 40" in refused(files, PRUNER, tmp_path, command=command)

    def test_layer_for_a_rule(self, files: Files) -> None:
        output = refused(files, PRUNER, "farthest_point", "--layer", 2)
        assert "--layer is for official weights; 'farthest_point' needs none" in output

    def test_seed(self, files: Files) -> None:
        assert "--seed" in refused(files, None, None, "--seed", 2**63)

    def test_rounds(self, files: Files) -> None:
        assert "--refine needs features" in refused(files, PRUNER, "grid", "--refine", 1)
        assert "--refine" in refused(files, None, None, "--refine", -1)

    @pytest.mark.parametrize("command", ["prune", "visualize"])
    def test_features(self, files: Files, command: str) -> None:
        def said(pruner: object, features: str) -> str:
            return refused(files, PRUNER, pruner, "--merge", "auto", "--features", features, command=command)

        of_no_use = said("grid", "early")
        assert "--features is for rules that compare some (farthest_point, greedy_dpp)" in of_no_use
        assert "not for 'grid': leave it out" in of_no_use
        assert "leave it out" in said(files.pruner, "consumed")
        for wrong in ("late", "-1", "1.5", "²"):
            assert "must be early, consumed or the number of a layer" in said("greedy_dpp", wrong)
        assert "--features must be between 0 and 4" in said("greedy_dpp", "5")

    def test_merge(self, files: Files) -> None:
        assert "'mean' is not one of" in refused(files, None, None, "--merge", "mean")

    def test_nothing_to_draw(self, files: Files) -> None:
        said = refused(files, PRUNER, "grid", "--merge", "off", "--no-weigh", command="visualize")
        assert "'grid' has no slots to draw; give a pruner, or --merge projected" in said

    def test_weights_that_no_attention_takes(self, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
        """Told of shapes alone, as everything that apply would refuse."""
        monkeypatch.setattr("ocvtp.vlm.resolving.why_no_weights", lambda _: "no room for them: do this")
        said = refused(files, None, None, "--weigh")
        assert "weigh=True is not possible here: no room for them: do this" in said

    def test_default_budget_is_called_the_default(self, files: Files) -> None:
        output = run("prune", *files.arguments, code=2)
        assert "between 1 and 16, the image tokens of this model; got 64 (the default)" in output


@pytest.mark.parametrize("command", ["prune", "visualize"])
class TestBrokenModelFolder:
    @pytest.fixture
    def folder(self, files: Files, tmp_path: Path) -> Path:
        return Path(shutil.copytree(files.model, tmp_path / "model"))

    def change_processor(self, folder: Path, **changes: object) -> None:
        """Save it as a person would have it, changed."""
        processor = transformers.AutoProcessor.from_pretrained(folder)
        for name, value in changes.items():
            owner = processor.image_processor if name == "crop_size" else processor
            setattr(owner, name, value)
        processor.save_pretrained(folder)

    def test_truncated_weights(self, files: Files, folder: Path, command: str) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:50_000])
        output = refused(files, MODEL, folder, command=command)
        assert f"the weights of {folder} are damaged or incomplete" in output
        assert "download the model again" in output

    def test_weights_of_another_model(self, files: Files, folder: Path, command: str) -> None:
        values = json.loads((folder / "config.json").read_text())
        values["text_config"]["hidden_size"] = 96
        (folder / "config.json").write_text(json.dumps(values))
        assert "other shapes than its config.json" in refused(files, MODEL, folder, command=command)

    def test_tokenizer_cut_short(self, files: Files, folder: Path, command: str) -> None:
        tokenizer = folder / "tokenizer.json"
        tokenizer.write_text(tokenizer.read_text()[:500])
        assert f"can't load the processor of {folder}" in refused(files, MODEL, folder, command=command)

    @pytest.mark.usefixtures("no_model")
    @pytest.mark.parametrize(
        ("part", "name", "value"),
        [
            ("vision_config", "num_hidden_layers", 10**12),
            ("text_config", "hidden_size", -64),
            ("text_config", "vocab_size", [256]),
            ("vision_config", "hidden_act", {"a": 1}),
            ("vision_config", "patch_size", None),
            ("text_config", "model_type", []),
        ],
    )
    def test_an_odd_config(
        self, files: Files, folder: Path, command: str, part: str, name: str, value: object
    ) -> None:
        values = json.loads((folder / "config.json").read_text())
        values[part][name] = value
        (folder / "config.json").write_text(json.dumps(values))
        output = refused(files, MODEL, folder, command=command)
        assert str(folder) in output
        assert "config.json" in output or "can't load the model" in output

    @pytest.mark.usefixtures("no_model")
    @pytest.mark.parametrize("patch_size", [None, 28])
    def test_patch_size(self, files: Files, folder: Path, command: str, patch_size: int | None) -> None:
        self.change_processor(folder, patch_size=patch_size)
        output = refused(files, MODEL, folder, command=command)
        assert f"processor.patch_size is {patch_size}, this model's tower cuts patches of 14" in output

    @pytest.mark.usefixtures("no_model")
    def test_image_size(self, files: Files, folder: Path, command: str) -> None:
        self.change_processor(folder, crop_size={"height": 28, "width": 42})
        output = refused(files, MODEL, folder, command=command)
        assert "makes images of 42 x 28 pixels, this model's tower takes 56 x 56" in output
        assert "processor.image_processor.size and crop_size" in output

    @pytest.mark.usefixtures("no_model")
    def test_number_of_placeholders(self, files: Files, folder: Path, command: str) -> None:
        self.change_processor(folder, num_additional_image_tokens=0)
        output = refused(files, MODEL, folder, command=command)
        assert "15 placeholders for an image, this model makes 16 tokens" in output


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that refuses writing, also to root."""
    folder = tmp_path / "locked"
    folder.mkdir()
    real = os.access

    def access(path: Path, mode: int) -> bool:
        return real(path, mode) and not (mode == os.W_OK and folder in (path, *Path(path).parents))

    monkeypatch.setattr(os, "access", access)
    return folder


class TestOut:
    @pytest.mark.usefixtures("no_model")
    def test_visualize(self, files: Files, tmp_path: Path, locked: Path) -> None:
        folder = tmp_path / "folder.png"
        folder.mkdir()

        def said(out: Path) -> str:
            # the image is wrong as well: --out has to be checked even before it
            return refused(files, IMAGE, "missing.jpg", "--out", out, command="visualize")

        assert "is a folder; choose another --out" in said(folder)
        assert "choose another --out" in said(tmp_path / "nowhere" / "overlay.png")
        assert "no permission" in said(locked / "overlay.png")

    def test_demo(self, tmp_path: Path, locked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("skimage")
        monkeypatch.setattr(demo, "_build", lambda *_: pytest.fail("--out was not checked first"))

        def said(out: Path) -> str:
            return run("demo", "--out", out, code=2)

        (tmp_path / "file").touch()
        assert "is a file, not a folder; choose another --out" in said(tmp_path / "file")
        assert "choose another --out" in said(tmp_path / "file" / "below")
        assert "no permission" in said(locked)
        (tmp_path / "out" / "overlay.png").mkdir(parents=True)
        assert "overlay.png is a folder; choose another --out" in said(tmp_path / "out")


def test_the_home_folder(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave ``~`` alone inside quotes and after ``--out=``."""
    monkeypatch.setenv("HOME", str(files.model.parent))
    monkeypatch.setenv("USERPROFILE", str(files.model.parent))
    tilde = ["~/photo.jpg", "--model", "~/model", "--pruner", "~/pruner", "--device", "cpu"]
    run("prune", *tilde, *ASK)
    run("visualize", *tilde, "--keep", "5", "--out=~/overlay.png")
    assert (files.model.parent / "overlay.png").is_file()
    asked = []
    monkeypatch.setattr(demo, "run", lambda *, out, **_: asked.append(out))
    run("demo", "--out=~/demo")
    assert asked == [files.model.parent / "demo"]
    assert "no model folder at ~nobody-of-this-name/model" in refused(
        files, MODEL, "~nobody-of-this-name/model"
    )


@pytest.mark.parametrize("written", [False, True])
def test_the_demo_benchmark_needs_no_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    comparison = demo.Comparison("prefill", [2.0], [1.0])
    monkeypatch.setattr(demo, "run", lambda **_: [comparison])
    out = tmp_path / "results" / "demo.json"
    monkeypatch.setattr(sys, "argv", ["bench.demo", *(["--out", str(out)] if written else [])])
    bench_demo.main()
    assert out.exists() == written
    if written:
        assert json.loads(out.read_text())["rows"][0]["speedup"] == 2
