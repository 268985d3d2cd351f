"""prune, visualize, env and the demo, end to end on local folders."""

from __future__ import annotations

import inspect
import io
import json
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

import ocvtp
import ocvtp_kernels
from ocvtp.cli import app
from ocvtp.commands import demo, env
from ocvtp.commands.loading import load_image
from ocvtp.commands.progress import busy, steps
from ocvtp.vlm.contracts.selector import DEFAULT_RULE
from ocvtp.vlm.options import Options
from tests.cli.conftest import Files
from tests.vlm.processor import image_processor
from tests.vlm.tiny_llava import GREEDY

ASK = ["--prompt", "w5 w6", "--keep", "5", "--max-new-tokens", "6"]


def run(*arguments: str | Path, code: int = 0) -> str:
    """Run a command in this process; returns what it wrote, both streams."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def json_in(output: str) -> dict:
    """The JSON object in a command's output, which progress may surround."""
    return json.loads(output[output.index("{\n") : output.rindex("\n}") + 2])


class TestPrune:
    def test_answer_and_figures(self, files: Files) -> None:
        result = json_in(run("prune", *files.arguments, *ASK, "--json"))
        assert (result["image_tokens_before"], result["image_tokens_after"]) == (16, 5)
        assert result["prompt_tokens_before"] - result["prompt_tokens_after"] == 11
        assert (result["device"], result["dtype"]) == ("cpu", "float32")
        assert result["new_tokens"] == 6
        times = result["milliseconds"]
        stages = ["vision tower", "pruner", "projector", "prefill"]
        assert all(times[stage] > 0 for stage in stages)
        assert sum(times[stage] for stage in stages) == pytest.approx(times["time to first token"])

    def test_the_answer_is_the_pruned_models(self, files: Files) -> None:
        processor = transformers.AutoProcessor.from_pretrained(files.model)
        model = transformers.LlavaForConditionalGeneration.from_pretrained(files.model).eval()
        ocvtp.apply(model, ocvtp.OCPruner.from_pretrained(files.pruner), keep=5)
        text = "USER: <image>\nw5 w6 ASSISTANT:"
        inputs = processor(images=Image.open(files.image), text=text, return_tensors="pt")
        output = model.generate(**inputs, **GREEDY)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.strip()
        assert json_in(run("prune", *files.arguments, *ASK, "--json"))["answer"] == answer.strip()
        assert answer.strip() in run("prune", *files.arguments, *ASK)

    def test_rounds_of_refinement_reach_the_pruner(self, files: Files) -> None:
        asked = ("prune", *files.arguments, "--keep", 4, "--max-new-tokens", 1, "--json")
        assert "2 rounds of refinement" in json_in(run(*asked, "--refine", 2))["report"]
        assert "refinement" not in json_in(run(*asked, "--refine", 0))["report"]

    def test_kept_tokens_stand_for_others(self, files: Files) -> None:
        """Answer, masses and report are those of apply with the same options."""
        processor = transformers.AutoProcessor.from_pretrained(files.model)
        model = transformers.LlavaForConditionalGeneration.from_pretrained(files.model).eval()
        pruner = ocvtp.OCPruner.from_pretrained(files.pruner)
        text = "USER: <image>\nw5 w6 ASSISTANT:"
        inputs = processor(images=Image.open(files.image), text=text, return_tensors="pt")
        answers = {}
        for said, merge, weigh in (
            (("--merge", "off", "--no-weigh"), "off", False),
            (("--merge", "features", "--no-weigh"), "features", False),
            (("--merge", "projected", "--weigh"), "projected", True),
        ):
            report = ocvtp.apply(model, pruner, keep=5, merge=merge, weigh=weigh)
            output = model.generate(**inputs, **GREEDY)
            answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            result = json_in(run("prune", *files.arguments, *ASK, *said, "--json"))
            assert (result["answer"], result["report"]) == (answer.strip(), str(report))
            mass = ocvtp.vlm.select(model, inputs["pixel_values"]).mass
            assert result["mass"] == (None if mass is None else mass[0].tolist())
            assert mass is None or mass.sum() == 16
            answers[merge] = result["answer"]
        assert answers["off"] != answers["projected"]
        shown = run("prune", *files.arguments, *ASK, "--merge", "projected", "--weigh")
        assert f"a kept token stands for {int(mass.min())} to {int(mass.max())}" in shown
        assert str(report).splitlines()[-1] in shown
        assert "averaged into the nearest kept one, weighed by proportional attention" in shown

    def test_what_is_not_said_is_left_to_apply(self, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[dict] = []
        real = ocvtp.apply

        def apply(model: object, pruner: object, **options: object) -> object:
            given.append({"pruner": pruner, **options})
            return real(model, pruner, **options)

        monkeypatch.setattr(ocvtp, "apply", apply)
        arguments = ["prune", *files.arguments[:3], *files.arguments[5:], *ASK]
        run(*arguments)
        run(*arguments, "--merge", "auto", "--pruner", "greedy_dpp", "--features", "1")
        unsaid = {"merge", "weigh", "features"}
        assert given[0]["pruner"] == DEFAULT_RULE
        assert not unsaid & set(given[0])
        assert {name: given[1][name] for name in unsaid & set(given[1])} == {"merge": "auto", "features": 1}

    def test_the_plan_has_the_defaults_of_apply(self) -> None:
        """Which are in two places: its signature, and the options that it makes of them."""
        parameters = inspect.signature(ocvtp.apply).parameters
        assert parameters["pruner"].default == DEFAULT_RULE
        options = {field.name: field.default for field in fields(Options) if field.default is not MISSING}
        assert options == {name: parameters[name].default for name in options}

    @pytest.mark.parametrize(("features", "layer"), [("early", 1), ("consumed", 4), ("3", 3)])
    def test_features_of_a_rule(self, files: Files, features: str, layer: int) -> None:
        arguments = [*files.arguments]
        arguments[4] = "greedy_dpp"
        told = json_in(run("prune", *arguments, *ASK, "--features", features, "--json"))
        assert f"greedy_dpp, which reads layer {layer}" in told["report"]
        assert told["image_tokens_after"] == 5

    def test_chat_template(self, files: Files, tmp_path: Path) -> None:
        model = tmp_path / "model"
        processor = transformers.AutoProcessor.from_pretrained(files.model)
        processor.chat_template = (
            "{% for m in messages %}{% for c in m.content %}"
            "{% if c.type == 'image' %} <image> {% else %} w9 {{ c.text }} {% endif %}"
            "{% endfor %}{% endfor %}"
        )
        transformers.LlavaForConditionalGeneration.from_pretrained(files.model).save_pretrained(model)
        processor.save_pretrained(model)
        arguments = [*files.arguments]
        arguments[2] = str(model)
        result = json_in(run("prune", *arguments, *ASK, "--json"))
        assert result["prompt_tokens_before"] == 16 + 3  # image, w9 and the two words of the prompt

    @pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "."])
    def test_official_weights(self, files: Files, tmp_path: Path, name: str) -> None:
        """The layer is the official one unless told; this model's encoder has too few layers for it."""
        official = ocvtp.OCPruner.from_pretrained(files.pruner).to_official()
        if name == "weights.safetensors":
            save_file(official, tmp_path / name)
        else:
            torch.save(official, tmp_path / "weights.pth")
        arguments = [*files.arguments]
        arguments[4] = str(tmp_path / name)
        assert "reads encoder layer 8" in run("prune", *arguments, *ASK, code=2)
        told = json_in(run("prune", *arguments, *ASK, "--json", "--layer", "2"))
        ours = json_in(run("prune", *files.arguments, *ASK, "--json"))
        assert (told["answer"], told["report"]) == (ours["answer"], ours["report"])

    def test_help_names_the_assumed_layer_and_promises_no_saving(self) -> None:
        text = " ".join(run("prune", "--help").replace("│", " ").split())
        assert "how long each stage takes" in text
        assert "saves" not in text
        assert "8 is assumed, unless --layer says otherwise" in text

    def test_half_precision(self, files: Files) -> None:
        result = json_in(run("prune", *files.arguments, *ASK, "--dtype", "bfloat16", "--json"))
        assert result["dtype"] == "bfloat16"


class TestVisualize:
    def test_writes_the_overlay(self, files: Files, tmp_path: Path) -> None:
        out = tmp_path / "overlay.png"
        arguments = [*files.arguments, "--keep", "5", "--dtype", "bfloat16", "--out", out]
        assert f"wrote {out}" in run("visualize", *arguments)
        with Image.open(out) as picture:
            assert picture.format == "PNG"
            assert picture.width > 2 * 600  # two panels, enlarged

    def test_whom_kept_patches_stand_for(self, files: Files, tmp_path: Path) -> None:
        """A panel more for a pruner; of a rule, which has no slots, a picture at all."""
        widths = {}
        for merge in ("off", "projected"):
            out = tmp_path / f"{merge}.png"
            run("visualize", *files.arguments, "--keep", "5", "--merge", merge, "--no-weigh", "--out", out)
            with Image.open(out) as picture:
                widths[merge] = picture.width
        assert widths["projected"] > widths["off"] + 600
        arguments = [*files.arguments]
        arguments[4] = "farthest_point"
        out = tmp_path / "rule.png"
        run("visualize", *arguments, "--keep", "5", "--merge", "off", "--weigh", "--out", out)
        with Image.open(out) as picture:
            assert picture.width == widths["off"]

    def test_output_is_checked_before_anything_loads(self, files: Files, tmp_path: Path) -> None:
        assert "must end in .png" in run("visualize", *files.arguments, "--out", "overlay.jpg", code=2)
        missing = tmp_path / "nowhere" / "overlay.png"
        assert "no folder" in run("visualize", *files.arguments, "--out", missing, code=2)

    def test_layer(self, files: Files, tmp_path: Path) -> None:
        torch.save(ocvtp.OCPruner.from_pretrained(files.pruner).to_official(), tmp_path / "weights.pth")
        arguments = [*files.arguments, "--keep", "5", "--out", tmp_path / "overlay.png"]
        arguments[4] = str(tmp_path / "weights.pth")
        run("visualize", *arguments, "--layer", "2")


class TestBadInput:
    @pytest.fixture
    def change(self, files: Files, monkeypatch: pytest.MonkeyPatch) -> object:
        """Run ``prune`` with one thing wrong; no model may have been loaded by then."""

        def run_with(position: int | None, value: str | Path, *extra: str) -> str:
            monkeypatch.setattr(
                "transformers.AutoModelForImageTextToText.from_pretrained",
                lambda *_, **__: pytest.fail("a model was loaded before the mistake was found"),
            )
            arguments = [*files.arguments]
            if position is not None:
                arguments[position] = str(value)
            return run("prune", *arguments, *ASK, *extra, code=2)

        return run_with

    def test_image(self, change: object, tmp_path: Path, files: Files) -> None:
        assert "no image at" in change(0, tmp_path / "missing.jpg")
        broken = tmp_path / "broken.jpg"
        broken.write_bytes(files.image.read_bytes()[:200])
        assert "can't be decoded" in change(0, broken)
        broken.write_text("not an image")
        assert "can't be decoded" in change(0, broken)
        assert "is a folder; give one image file" in change(0, tmp_path)
        assert "URLs are not read: download" in change(0, "https://example.org/cat.jpg")

    def test_budget(self, change: object) -> None:
        assert "--keep must be at least 1" in change(None, "", "--keep", "0")

    def test_budget_beyond_the_image(self, change: object) -> None:
        assert "between 1 and 16" in change(None, "", "--keep", "17")

    def test_pruner(self, change: object, tmp_path: Path) -> None:
        assert "neither a folder nor a repository id" in change(4, tmp_path / "nowhere")
        assert "has neither" in change(4, tmp_path)
        (tmp_path / "weights.pth").write_text("junk")
        assert "can't be read" in change(4, tmp_path / "weights.pth")

    def test_pruner_of_another_width(self, change: object, tmp_path: Path) -> None:
        config = ocvtp.PrunerConfig(in_dim=48, hidden_dim=8, slot_dim=8, ffn_dim=8, layer=1)
        ocvtp.OCPruner(config).save_pretrained(tmp_path)
        output = change(4, tmp_path)
        assert "48" in output
        assert "64" in output

    def test_model(self, change: object, tmp_path: Path) -> None:
        assert "no model folder" in change(2, tmp_path / "nowhere")
        assert "no model folder" in change(2, "models/of/mine")
        assert "can't load the model" in change(2, tmp_path)  # a folder without config.json
        transformers.BertConfig().save_pretrained(tmp_path)
        assert "'bert' model; ocvtp prunes these: gemma3, " in change(2, tmp_path)

    def test_device_and_dtype(self, change: object) -> None:
        assert "unknown device 'tpu9'" in change(6, "tpu9")
        assert "unknown device 'meta'" in change(6, "meta")  # torch knows it, nothing runs on it
        assert "unknown dtype 'int8'" in change(None, "", "--dtype", "int8")
        if not torch.cuda.is_available():
            assert "use --device cpu" in change(6, "cuda")

    def test_gpu_that_is_not_there(self, change: object, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        assert "this machine has 2" in change(6, "cuda:2")

    def test_model_that_the_hub_does_not_give(self, change: object, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError("couldn't connect")

        monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
        output = change(2, "nobody/nothing")
        assert "'nobody/nothing': no such folder here" in output
        assert "couldn't connect" in output

    def test_prompt_with_a_second_placeholder(self, change: object) -> None:
        assert "leave <image> out of --prompt" in change(None, "", "--prompt", "w5 <image>")


def test_sixteen_bit_images_are_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    loaded = load_image(tmp_path / "deep.png")
    assert loaded.mode == "RGB"
    assert np.abs(np.asarray(loaded)[..., 0] - grey / 257).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    Image.new("RGB", (9, 7), (255, 255, 255)).convert(mode).save(path)
    loaded = load_image(path)
    assert (loaded.mode, loaded.size) == ("RGB", (9, 7))
    assert np.asarray(loaded).min() >= 250


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError, OSError])
def test_unexpected_failures_are_not_hidden(
    kind: type[Exception], files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a bug raises, it is no mistake of the user's."""

    def fail(*_: object, **__: object) -> None:
        raise kind("a bug")

    monkeypatch.setattr("ocvtp.commands.prune.timed_generate", fail)
    result = CliRunner().invoke(app, ["prune", *files.arguments, *ASK])
    assert result.exit_code == 1
    assert isinstance(result.exception, kind)


def test_no_traceback_for_a_mistake(files: Files) -> None:
    """The whole way, as a shell sees it: one line on the error stream, nothing on the other."""
    result = subprocess.run(
        [sys.executable, "-m", "ocvtp.cli", "prune", "missing.jpg", *files.arguments[1:]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: no image at missing.jpg\n"


def test_bars_show_where_someone_watches_and_nowhere_else() -> None:
    for terminal in (True, False):
        written = io.StringIO()
        console = Console(file=written, force_terminal=terminal, width=100)
        with steps(console, "counting", 2) as step:
            step("one")
            step("two")
        with busy(console, "waiting"):
            pass
        shown = written.getvalue()
        assert all((text in shown) == terminal for text in ("counting: two", "1/2", "waiting"))


def test_env() -> None:
    facts = json_in(run("env", "--json"))
    assert facts["ocvtp"] == ocvtp.__version__
    assert facts["torch"] == torch.__version__
    assert facts["transformers"] == transformers.__version__
    assert "PyTorch reference" in facts["kernel backend"]
    table = run("env")
    assert all(name in table for name in facts)


@pytest.mark.parametrize(
    ("version", "route"),
    [
        ("5.23.0", "mm_encoder_outputs"),
        ("6.0rc1", "mm_encoder_outputs"),
        ("5.18.0.dev0", "mm_encoder_outputs"),
        ("5.17.0", "inputs_embeds"),
        ("5.0rc2", "inputs_embeds"),
    ],
)
def test_hand_over_route(version: str, route: str) -> None:
    assert env._route(version).startswith(route)


def test_the_error_of_an_explicit_backend_is_public() -> None:
    assert ocvtp.BackendUnavailableError is ocvtp_kernels.BackendUnavailableError


def test_env_names_the_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("ocvtp_kernels._arch.interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old GPU")
    for capability, expected in (((9, 0), "triton (sm90 tiles)"), ((7, 5), "no tiles were made for Old GPU")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert expected in env._backend()


def test_env_without_transformers_and_triton() -> None:
    code = (
        "import importlib.metadata as m; real = m.version\n"
        "def version(name):\n"
        "    if name in ('triton', 'transformers'): raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "import sys; sys.modules['triton'] = sys.modules['transformers'] = None\n"
        "sys.argv = ['ocvtp', 'env', '--json']\n"
        "from ocvtp.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["triton"] == facts["transformers"] == "absent"
    assert "transformers is absent" in facts["image hand-over"]


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys\nfrom ocvtp.cli import main\n"
        "sys.argv = ['ocvtp', {argument!r}]\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    for argument, expected in (("--version", f"ocvtp {ocvtp.__version__}"), ("--help", "visualize")):
        result = subprocess.run(
            [sys.executable, "-c", code.format(argument=argument)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        assert expected in result.stdout


class TestDemo:
    TINY = demo.DemoSize(
        vision={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
        text={
            "vocab_size": 200,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        pruner={"hidden_dim": 96, "slot_dim": 32, "ffn_dim": 64, "layer": 2},
    )

    def demonstrate(self, out: Path, **options: object) -> tuple[str, list[demo.Comparison]]:
        pytest.importorskip("skimage")
        console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
        settings = {"keep": 5, "repeats": 2, "threads": None, **options}
        comparisons = demo.run(out=out, console=console, size=self.TINY, **settings)
        return console.export_text(), comparisons

    def test_checks_times_and_draws(self, tmp_path: Path) -> None:
        text, comparisons = self.demonstrate(tmp_path / "out")
        assert [c.name for c in comparisons] == ["language model prefill", "time to first token"]
        for comparison in comparisons:
            assert len(comparison.unpruned) == len(comparison.pruned) == 2
            assert f"{comparison.speedup:.2f}x" in text
        prefill, first = comparisons
        assert (prefill.standing, prefill.standing_speedup) == ([], None)  # the language model alone
        assert len(first.standing) == 2
        assert f"{first.standing_speedup:.2f}x" in text
        assert text.count("Weights are random") == 2
        assert "checks passed" in text
        with Image.open(tmp_path / "out" / "overlay.png") as picture:
            assert picture.width > 1000

    def test_a_wrong_selection_stops_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The gate is real: a hand-over that disagrees with the selection must not be timed."""
        monkeypatch.setattr("ocvtp.commands.demo._prefill", lambda model, embeddings: -1)
        with pytest.raises(RuntimeError, match="shortened by hand"):
            self.demonstrate(tmp_path)

    def test_budgets(self) -> None:
        assert "at least 1" in run("demo", "--keep", "0", code=2)
        assert "at most 576" in run("demo", "--keep", "577", code=2)

    def test_without_scikit_image(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "skimage", None)
        assert "pip install scikit-image" in run("demo", code=2)

    def test_full_size_is_llava_15s_vision_and_half_a_billion(self) -> None:
        assert demo.LLAVA_SHAPED.image_tokens == 576
        with torch.device("meta"):
            model, _ = demo._build(demo.LLAVA_SHAPED)
        assert 0.45e9 < sum(p.numel() for p in demo._language_model(model)) < 0.56e9
        assert model.model.vision_tower.config.num_hidden_layers == 24


def test_image_processor_is_undone_exactly(files: Files) -> None:
    from ocvtp.visualize import unnormalize

    processor = image_processor()
    square = Image.open(files.image).crop((0, 0, 56, 56))  # no resizing, no cropping
    pixels = processor(images=square, return_tensors="np")["pixel_values"][0]
    seen = unnormalize(pixels, processor.image_mean, processor.image_std, processor.rescale_factor)
    assert np.array_equal(np.asarray(seen), np.asarray(square))
