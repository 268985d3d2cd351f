"""Printed commands: a shell runs them, our model takes what they say, and what can't work is not printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaConfig, LlavaNextConfig, Qwen2_5_VLConfig

from ocvtp.harness.arguments import Arguments
from ocvtp.harness.commands import check_method, impossible, main, runs, script
from ocvtp.harness.protocol import MODELS
from ocvtp.vlm.options import Options
from ocvtp.vlm.resolving import resolve
from ocvtp.vlm.skeleton import skeleton_of

ROOT = Path(__file__).parents[2]
LLAVA = MODELS["llava-1.5-7b"]
NEXT = MODELS["llava-next-7b"]
QWEN = MODELS["qwen2.5-vl-7b"]
INSIDE = ("dart", "fastv", "pyramiddrop", "sparsevlm", "sparsevlm2")
RULES = ("attention", "random", "grid", "farthest_point", "greedy_dpp")
ON_QWEN = (
    *("cdpruner", "divprune", "hiprune", "prumerge", "prumerge+", "tome", "trim"),
    *("visionzip", "vispruner"),
)

#: Stands for every program of a script: what it was called with becomes a line of JSON.
RECORDER = """#!{python}
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
if words == ["-m", "ocvtp.harness.tasks"]:
    print("/the folder/of tasks")
    sys.exit()
with open({log!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *words]) + "\\n")
if "--output_path" in words and not os.environ.get("FAILS"):
    folder = Path(words[words.index("--output_path") + 1]) / "some__model"
    folder.mkdir(parents=True)
    (folder / "20260101_000000_results.json").write_text("{{}}")
"""


def shell(text: str, folder: Path, **env: str) -> tuple[list[list[str]], str]:
    """Calls that a script makes, and what it prints, in a folder."""
    log, tools = folder / "log", folder / "bin"
    tools.mkdir()
    for name in ("lmms-eval", "accelerate", "python"):
        (tools / name).write_text(RECORDER.format(python=sys.executable, log=str(log)))
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-eu", "-c", text],
        cwd=folder,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in log.read_text().splitlines()], done.stdout


def option(call: list[str], name: str) -> str:
    return call[call.index(name) + 1]


def as_lmms_eval(text: str) -> dict[str, Any]:
    """``--model_args`` as its parser reads them: cut at commas outside of brackets and quotes."""
    pairs = re.findall(r'([a-z_]+)=("[^"]*"|\[.*?\](?=,[a-z_]+=|$)|[^,]*)(?:,|$)', text)
    assert ",".join(f"{name}={value}" for name, value in pairs) == text
    found: dict[str, Any] = {}
    for name, value in pairs:
        if value in ("true", "false"):
            found[name] = value == "true"
        else:
            number = re.fullmatch(r"[0-9.]+", value)
            found[name] = (float(value) if "." in value else int(value)) if number else value
    return found


def test_a_shell_runs_them(tmp_path: Path) -> None:
    text = script(LLAVA, methods=("pruner", "visionzip"), budgets=(192, 64), out="my runs of May")
    calls, printed = shell(text, tmp_path)
    *asked, table = calls
    labels = ["none", "pruner-192", "pruner-64", "visionzip-192", "visionzip-64"]
    folders = [f"my runs of May/{label}" for label in labels]
    assert [option(call, "--output_path") for call in asked] == folders
    for call, folder in zip(asked, folders, strict=True):
        assert call[0] == "lmms-eval"
        assert "--log_samples" in call
        assert option(call, "--model") == "ocvtp"
        assert option(call, "--include_path") == "/the folder/of tasks"
        assert option(call, "--tasks") == "ocvtp_paper"
        assert option(call, "--batch_size") == "1"
        said = Arguments.from_strings(as_lmms_eval(option(call, "--model_args")))
        assert said.resume == f"{folder}/answers"
        assert said.pretrained == "llava-hf/llava-1.5-7b-hf"
        assert said.pad_to_square is True
        assert said.system_prompt == "vicuna_v1"
    assert table == ["python", "-m", "ocvtp.harness.relative", *folders]
    assert "has no results" not in printed


def test_a_run_without_results_is_told(tmp_path: Path) -> None:
    _, printed = shell(script(LLAVA, budgets=(64,)), tmp_path, FAILS="yes")
    assert re.findall(r"(\S+) has no results", printed) == ["none", "pruner-64"]


def test_several_gpus(tmp_path: Path) -> None:
    calls, _ = shell(script(LLAVA, budgets=(64,), processes=4, batch_size=8, tasks=("pope", "mmb")), tmp_path)
    for call in calls[:-1]:
        assert call[:6] == ["accelerate", "launch", "--num_processes", "4", "-m", "lmms_eval"]
        assert option(call, "--batch_size") == "8"
        assert option(call, "--tasks") == "pope,ocvtp_mmb"


def test_a_pruner_of_ones_own(tmp_path: Path) -> None:
    text = script(QWEN, pruner="trained, with care/qwen", budgets=(0.25,))
    calls, _ = shell(text, tmp_path)
    said = Arguments.from_strings(as_lmms_eval(option(calls[1], "--model_args")))
    assert (said.pruner, said.keep, said.dtype) == ("trained, with care/qwen", 0.25, "bfloat16")


def test_a_pruner_whose_name_is_a_number(tmp_path: Path) -> None:
    calls, _ = shell(script(LLAVA, pruner="12345", budgets=(64,)), tmp_path)
    assert 'pruner="12345",' in option(calls[1], "--model_args")
    assert Arguments.from_strings(as_lmms_eval(option(calls[1], "--model_args"))).pruner == "12345"


def test_pixels_of_the_harness() -> None:
    """What lmms-eval's own class sets; the checkpoint's are others."""
    for row in runs(QWEN, ("divprune",), None, None):
        said = Arguments.from_strings(as_lmms_eval(",".join("=".join(pair) for pair in row.arguments)))
        assert (said.min_pixels, said.max_pixels) == (256 * 28 * 28, 1605632)


@pytest.fixture(scope="module")
def adapters() -> dict[str, Any]:
    """The published models' configurations, as far as methods look, without weights."""
    clip = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096}
    clip |= {"num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    llama = {"model_type": "llama", "num_hidden_layers": 32, "vocab_size": 32064}
    tiles = [[672, 672]]
    return {
        LLAVA.name: skeleton_of(LlavaConfig(vision_config=clip, text_config=llama)),
        NEXT.name: skeleton_of(
            LlavaNextConfig(vision_config=clip, text_config=llama, image_grid_pinpoints=tiles)
        ),
        QWEN.name: skeleton_of(Qwen2_5_VLConfig(text_config={"num_hidden_layers": 28})),
    }


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_what_is_printed_can_be_had(model: Any, adapters: dict[str, Any]) -> None:
    """Every method at every budget of the paper, on the published architecture, where it is offered."""
    rivals = (*ON_QWEN, "fastervlm") if model is not QWEN else ON_QWEN
    rows = runs(model, (*RULES, *rivals, *INSIDE), None, None, merged=True)
    assert rows[0].label == "none"
    assert len({row.label for row in rows}) == len(rows)
    for row in rows[1:]:
        said = Arguments.from_strings(as_lmms_eval(",".join("=".join(pair) for pair in row.arguments)))
        chosen: Any = said.pruner
        if chosen in ("trim", "cdpruner"):  # wants CLIP's weights
            assert (said.text_encoder is not None) == (model is not QWEN)
            continue
        resolve(adapters[model.name], Options(chosen, keep=said.keep, **said.options))
    offered = {row.label for row in rows}
    for method in INSIDE:
        for budget in model.budgets:
            assert (f"{method}-{budget}" in offered) == (impossible(model, method, budget) is None)


def test_published_rows_throw_dropped_tokens_away() -> None:
    _, plain, merged, rival = (
        runs(LLAVA, ("pruner",), (64,), None, merged=True)
        + runs(LLAVA, ("visionzip",), (64,), None, merged=True)[1:]
    )
    assert dict(plain.arguments)["merge"] == "off"
    assert dict(plain.arguments)["weigh"] == "false"
    assert not {"merge", "weigh"} & {*dict(merged.arguments), *dict(rival.arguments)}
    assert (plain.label, merged.label) == ("pruner-64", "pruner-64-merged")


def test_tiles_as_published() -> None:
    none, ours, inside = (dict(row.arguments) for row in runs(NEXT, ("pruner", "fastv"), (640,), None))
    assert ours["layout"] == "official"
    assert not {"layout"} & {*none, *inside}
    assert ours["image_grid_pinpoints"] == none["image_grid_pinpoints"] == "[[672,672]]"
    # Unpruned tiles are packed, and leave numbers that differ: a share of 2880.
    assert (ours["keep"], inside["keep"]) == ("640", "0.2222")


def test_budgets_of_the_paper_that_cannot_be_had_are_named() -> None:
    text = script(NEXT, methods=("fastv",))
    assert "# no row of fastv at 160: " in text
    assert "runs/fastv-320" in text
    assert "runs/fastv-160" not in text
    with pytest.raises(ValueError, match="fastv can't have --keep 160: "):
        script(NEXT, methods=("fastv",), budgets=(160,))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llava-1.5-7b", "--methods", "fastw"], "no method 'fastw'; there are pruner, .*fastv"),
        (["qwen2.5-vl-7b"], "no pruner for this encoder is published"),
        (["qwen2.5-vl-7b", "--methods", "fastervlm"], "fastervlm has no form on qwen2.5-vl-7b"),
        (["qwen2.5-vl-7b", "--methods", "fastv", "--keep", "64"], "it takes a share"),
        (["llava-1.5-7b", "--methods", "grid", "--pruner", "mine"], "--pruner is for the method pruner"),
        (["llava-1.5-7b", "--methods", "grid", "grid"], "method grid is there twice"),
        (["llava-1.5-7b", "--keep", "64", "64"], "budget 64 is there twice"),
        (["llava-1.5-7b", "--keep", "0"], "--keep 0: tokens, at least 1, fewer than the 576"),
        (["llava-1.5-7b", "--keep", "576"], "--keep 576: "),
        (["llava-1.5-7b", "--keep", "1.0"], "--keep 1.0: "),
        (["llava-1.5-7b", "--keep", "nan"], "--keep nan: "),
        (["llava-1.5-7b", "--keep", "many"], "tokens, or a share such as 0.25; got 'many'"),
        (["llava-1.5-7b", "--tasks", "mmvet"], "no benchmark 'mmvet'"),
        (["llava-1.5-7b", "--out", "runs, of May"], "--out runs, of May: lmms-eval cuts its --output_path"),
        (["llava-1.5-7b", "--out", "May's"], "--out May's: lmms-eval's --model_args can't have ' in a name"),
        (["llava-1.5-7b", "--out", 'a"b'], """--out a"b: lmms-eval's --model_args can't have " """),
        (["llava-1.5-7b", "--pruner", "my 'best'"], "--pruner my 'best': .* can't have ' in a name"),
        (["llava-1.5-7b", "--pruner", 'a"b'], '--pruner a"b: .* can\'t have " in a name'),
        (["llava-1.5-7b", "--pruner", "a{b"], "--pruner a{b: .* can't have { in a name"),
        (["llava-1.5-7b", "--out", "a[1"], r"--out a\[1: .* can't have \[ in a name"),
        (["llava-1.5-7b", "--gpus", "0"], "--gpus and --batch-size are at least 1"),
        (["llava-2"], "invalid choice: 'llava-2'"),
        ([], "which model"),
    ],
)
def test_what_cannot_work_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert re.search(message, err)


def test_methods_are_those_that_the_model_takes() -> None:
    for name in (*RULES, *ON_QWEN, *INSIDE):
        check_method(name)
        assert Arguments("model", pruner=name).named


def test_listing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^POPE +pope +test, about 9000 questions: F1 = pope_f1_score .*accuracy = ", out, re.M)
    assert "inferred" in out


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, ocvtp.harness.commands as commands\n"
        "try: commands.main(['--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--methods" in done.stdout
