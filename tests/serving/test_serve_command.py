"""``ocvtp serve`` up to the moment when vLLM takes over."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ocvtp
import ocvtp.serving
from ocvtp.commands import serve
from tests.cli.test_commands import run
from tests.vlm.tiny_llava import llava

ASSETS = Path(__file__).parents[2] / "assets"
MODEL, PRUNER = str(ASSETS / "testbed"), str(ASSETS / "testbed-pruner")
ARCHITECTURE = "OcvtpLlavaForConditionalGeneration"


def printed(*arguments: str) -> list[str]:
    return shlex.split(run("serve", *arguments, "--print").strip())


def overrides(words: list[str]) -> Any:
    return json.loads(words[words.index("--hf-overrides") + 1])


def test_what_it_prints() -> None:
    words = printed(MODEL, "--keep", "28", "--pruner", PRUNER)
    assert words[:3] == ["vllm", "serve", MODEL]
    assert overrides(words) == {"architectures": [ARCHITECTURE], "ocvtp": {"keep": 28, "pruner": PRUNER}}
    assert len(words) == 5


def test_our_options() -> None:
    words = printed(
        *(MODEL, "--keep", "0.25", "--pruner", "farthest_point", "--merge", "off", "--features", "early"),
        *("--refine", "2"),
    )
    assert overrides(words)["ocvtp"] == {
        "keep": 0.25,
        "pruner": "farthest_point",
        "merge": "off",
        "features": "early",
        "refine": 2,
    }
    assert overrides(printed(MODEL, "--pruner-seed", "3", "--pruner", "random"))["ocvtp"]["seed"] == 3


def test_a_pruners_folder_is_found_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ASSETS)
    assert (
        overrides(printed(MODEL, "--pruner", "testbed-pruner", "--keep", "28"))["ocvtp"]["pruner"] == PRUNER
    )


def test_vllms_options_go_through() -> None:
    theirs = ["--port", "8000", "-tp", "2", "--limit-mm-per-prompt", '{"image": 2}', "--seed", "4", "--x=y"]
    words = printed(MODEL, *theirs)
    assert words[5:] == theirs
    assert "seed" not in overrides(words)["ocvtp"]


@pytest.mark.parametrize(
    "spelled", [["--hf-overrides", '{"rope_theta": 5}'], ['--hf_overrides={"rope_theta": 5}']]
)
def test_overrides_are_joined(spelled: list[str]) -> None:
    words = printed(MODEL, *spelled)
    assert overrides(words) == {"rope_theta": 5, "architectures": [ARCHITECTURE], "ocvtp": {"keep": 64}}
    assert words.count("--hf-overrides") == 1
    assert len(words) == 5


MISTAKES: dict[str, tuple[list[str], str]] = {
    "model behind": (["--port", "80", MODEL], "give the model first: ocvtp serve MODEL"),
    "a pruner as model": ([PRUNER], "holds a pruner, not a model: are MODEL and --pruner swapped?"),
    "a model as pruner": ([MODEL, "--pruner", MODEL], "holds a 'llava' model, not a pruner"),
    "too many": ([MODEL, "--keep", "999"], "keep must be between 1 and 256"),
    "no such model": (["./nothing"], "no model folder at ./nothing"),
    "no such pruner": ([MODEL, "--pruner", "./nothing"], "neither a folder nor a repository id"),
    "before the projector": ([MODEL, "--merge", "features"], "the projector too"),
    "newlines": ([MODEL, "--newlines", "all"], "is not available for llava"),
    "our overrides": (
        [MODEL, "--hf-overrides", '{"architectures": ["X"]}'],
        "architectures, which ocvtp serve",
    ),
    "no overrides": ([MODEL, "--hf-overrides", "[3]"], "must be a JSON object; got '[3]'"),
    "overrides by key": ([MODEL, "--hf-overrides.x", "3"], "give --hf-overrides one JSON object"),
}


@pytest.mark.parametrize(("arguments", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(arguments: list[str], said: str) -> None:
    assert said in run("serve", *arguments, "--print", code=2)


def test_a_model_that_vllm_cannot_serve_pruned(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    output = run("serve", str(tmp_path), "--print", code=2)
    assert "is a 'bert' model; ocvtp prunes these: gemma3, idefics3, internvl, llava" in output


def test_a_file_of_options(tmp_path: Path) -> None:
    """vLLM lets the command line win over it, so overrides in it would be lost without a word."""
    file = tmp_path / "serve.yaml"
    file.write_text("port: 8000\n")
    assert printed(MODEL, "--config", str(file))[5:] == ["--config", str(file)]
    file.write_text("port: 8000\nhf_overrides: '{\"theta\": 5}'\n")
    for spelled in (["--config", str(file)], [f"--config={file}"]):
        assert "has hf-overrides, which ocvtp serve" in run("serve", MODEL, *spelled, "--print", code=2)
    assert "can't be read" in run("serve", MODEL, "--config", "./none.yaml", "--print", code=2)


@pytest.mark.parametrize("spelled", [["--revision", "v2"], ["--revision=v2"]])
def test_the_revision_that_vllm_will_load(spelled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    read = serve.read_model_config

    def reading(source: str, revision: str | None = None) -> Any:
        seen.append(revision)
        return read(source)

    monkeypatch.setattr(serve, "read_model_config", reading)
    assert printed(MODEL, *spelled)[5:] == spelled
    assert seen == ["v2"]


def test_a_vllm_that_was_told_to_leave_us_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("VLLM_PLUGINS", "another,one")
    assert "VLLM_PLUGINS is 'another,one', so vLLM won't load ocvtp" in run("serve", MODEL, code=2)
    monkeypatch.setenv("VLLM_PLUGINS", "another,ocvtp")
    serve.check_installed()


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    find = serve.importlib.util.find_spec
    monkeypatch.setattr(
        serve.importlib.util, "find_spec", lambda name: None if name == "vllm" else find(name)
    )
    assert "vLLM is not installed in this environment: pip install vllm, or --print" in run(
        "serve", MODEL, code=2
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What would have been run."""
    seen: list[list[str]] = []
    monkeypatch.setattr(serve, "check_installed", lambda: None)
    monkeypatch.setattr(serve.os, "execv", lambda program, words: seen.append([program, *words[1:]]))
    return lambda: seen[0]


def test_it_becomes_vllm(started: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.importlib.metadata, "version", lambda name: "0.32.0")
    words = shlex.split(run("serve", MODEL, "--port", "8000").strip())
    assert started() == [sys.executable, "-m", "vllm.entrypoints.cli.main", *words[1:]]


def test_a_build_of_another_name(started: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose own command looks for a distribution called vllm, and ends."""

    def missing(name: str) -> str:
        raise serve.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(serve.importlib.metadata, "version", missing)
    words = shlex.split(run("serve", MODEL, "--port", "8000").strip())
    module = ["-m", "vllm.entrypoints.openai.api_server", "--model", MODEL]
    assert started() == [sys.executable, *module, *words[3:]]


def test_arguments_for_an_engine(tmp_path: Path) -> None:
    llava().config.save_pretrained(tmp_path)
    found = ocvtp.serving.engine_args(str(tmp_path), keep=3, pruner="grid")
    assert found == {
        "hf_overrides": {"architectures": [ARCHITECTURE], "ocvtp": {"keep": 3, "pruner": "grid"}}
    }
    with pytest.raises(ValueError, match="keep must be between"):
        ocvtp.serving.engine_args(str(tmp_path), keep=3000)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ocvtp.UnsupportedModelError, match=r"'bert'.* in vLLM; supported: gemma3, idefics3"):
        ocvtp.serving.engine_args(str(tmp_path), keep=3)
