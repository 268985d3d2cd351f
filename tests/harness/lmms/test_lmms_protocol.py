"""The protocol against lmms-eval's own tasks, and printed commands against its parser."""

from __future__ import annotations

import ast
import contextlib
import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed here: make test-eval")

import lmms_eval.models
import lmms_eval.tasks
import pandas
from lmms_eval.loggers import EvaluationTracker
from lmms_eval.loggers.evaluation_tracker import GeneralConfigTracker
from lmms_eval.utils import simple_parse_args_string

from ocvtp.harness.arguments import Arguments
from ocvtp.harness.commands import script
from ocvtp.harness.protocol import BENCHMARKS, GROUP, MODELS, Benchmark
from ocvtp.harness.relative import table
from ocvtp.harness.results import Row, read_row
from tests.harness.lmms.conftest import Runs
from tests.vlm.hub_folders import write_folder

TASKS = Path(lmms_eval.tasks.__file__).parent


class Loader(yaml.SafeLoader):
    """Reads lmms-eval's files, whose functions are tags."""


Loader.add_constructor("!function", lambda loader, node: f"function {loader.construct_scalar(node)}")


@pytest.fixture(scope="module")
def theirs() -> dict[str, dict[str, Any]]:
    """lmms-eval's own settings of the paper's tasks, with what they include."""
    wanted = {one.task for one in BENCHMARKS}
    found: dict[str, dict[str, Any]] = {}
    for path in TASKS.glob("*/*.yaml"):
        name = re.search(r"^task: *[\"']?([a-z_0-9]+)[\"']? *$", path.read_text(encoding="utf-8"), re.M)
        if name is not None and name[1] in wanted:
            assert name[1] not in found, path
            found[name[1]] = loaded(path)
    assert set(found) == wanted
    return found


def loaded(path: Path) -> dict[str, Any]:
    settings = dict(yaml.load(path.read_text(encoding="utf-8"), Loader))
    base = settings.pop("include", None)
    return settings if base is None else {**loaded(path.parent / base), **settings}


@pytest.mark.parametrize("one", BENCHMARKS, ids=lambda one: one.task)
def test_their_task_is_as_the_protocol_has_it(one: Benchmark, theirs: dict[str, dict[str, Any]]) -> None:
    settings = theirs[one.task]
    reported = {metric["metric"] for metric in settings["metric_list"]}
    assert {name for score in one.scores for name in score.metrics} <= reported
    assert "filter_list" not in settings  # so that every metric is "NAME,none"
    assert settings["output_type"] == "generate_until"
    assert one.split in (settings["test_split"], settings.get("dataset_name", "").split("_instructions")[0])
    assert bool((settings.get("dataset_kwargs") or {}).get("token")) == one.login


def test_what_is_changed_is_otherwise_in_theirs(theirs: dict[str, dict[str, Any]]) -> None:
    said = theirs["textvqa_val"]["lmms_eval_specific_kwargs"]["default"]
    assert said["ocr"] is False
    ours = yaml.load(
        (Path(__file__).parents[3] / "ocvtp/harness/tasks/ocvtp_textvqa.yaml").read_text(), Loader
    )
    assert ours["task"][0]["lmms_eval_specific_kwargs"]["default"] == {**said, "ocr": True}
    for name in ("mmbench_en_dev", "mmbench_cn_dev"):
        asks = [metric["aggregation"] for metric in theirs[name]["metric_list"]]
        assert not any("paper.mmbench" in text for text in asks)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_their_parser_reads_what_is_printed(model: Any) -> None:
    text = script(
        model, methods=("pruner", "tome", "fastv"), pruner="a folder, of mine", out="some runs", merged=True
    )
    lines = shlex.split(text, comments=True)
    given = [after for word, after in itertools.pairwise(lines) if word == "--model_args"]
    folders = [after for word, after in itertools.pairwise(lines) if word == "--output_path"]
    assert len(given) == len(folders) > 7
    for one, folder in zip(given, folders, strict=True):
        said = Arguments.from_strings(simple_parse_args_string(one))
        assert said.pretrained == model.checkpoint
        assert said.resume == f"{folder}/answers"
        assert said.unpruned == folder.endswith("none")
        assert said.image_grid_pinpoints == ([[672, 672]] if "next" in model.name else None)
        if said.pruner == "a folder, of mine":
            assert (said.options.get("weigh"), said.options.get("merge")) in ((False, "off"), (None, None))


def test_results_are_one_folder_down() -> None:
    """Where the printed ``ls`` looks."""
    tracker = GeneralConfigTracker()
    for model in MODELS.values():
        tracker.log_experiment_args(
            model_source="ocvtp",
            model_args=f"pretrained={model.checkpoint},dtype=float16",
            system_instruction="",
            chat_template="",
            fewshot_as_multiturn=False,
        )
        assert tracker.model_name_sanitized
        assert "/" not in tracker.model_name_sanitized


def test_pixels_are_those_of_their_class() -> None:
    """Read, not imported: it wants packages that it doesn't ask for."""
    file = Path(lmms_eval.models.__file__).parent / "simple" / "qwen2_5_vl.py"
    (made,) = (
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    defaults = made.args.defaults
    named = zip(made.args.args[-len(defaults) :], defaults, strict=True)
    theirs = {one.arg: eval(ast.unparse(value)) for one, value in named if one.arg.endswith("_pixels")}
    ours = dict(MODELS["qwen2.5-vl-7b"].arguments)
    assert theirs == {name: int(ours[name]) for name in ("min_pixels", "max_pixels")}


@pytest.fixture
def rows(run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Row]:
    """Of a small model, as lmms-eval writes them: the protocol's tasks unpruned and pruned, and its own.

    The model says a letter, about which nobody asks a judge. Their MMBench writes a sheet for its server.
    """
    monkeypatch.setattr(pandas, "ExcelWriter", contextlib.nullcontext)
    monkeypatch.setattr(pandas.DataFrame, "to_excel", lambda *_, **__: None)
    monkeypatch.setattr(PreTrainedTokenizerBase, "batch_decode", lambda _, rows, **__: ["B"] * len(rows))
    folder = write_folder(tmp_path / "hub", "llava-hf/llava-1.5-7b-hf")
    found = {}
    few: dict[str, Any] = {"gen_kwargs": "max_new_tokens=1", "limit": 4}  # MME is asked in pairs
    changed = [one for one in BENCHMARKS if one.asked]
    for label, pruner, tasks in (
        ("none", "none", [GROUP]),
        ("a quarter", "random,keep=0.25", [GROUP]),
        ("theirs", "none", [one.task for one in changed]),
    ):
        tracker = EvaluationTracker(output_path=str(tmp_path / label))
        whole = run(f"pretrained={folder},pruner={pruner}", tasks, 4, evaluation_tracker=tracker, **few).found
        tracker.save_results_aggregated(whole, whole.pop("samples"), "2026-12-01T00:00:00")
        found[label] = read_row(tmp_path / label)
    return found


def test_what_lmms_eval_writes_is_told_apart(rows: dict[str, Row]) -> None:
    none, quarter, theirs = rows.values()
    text = table([none, quarter])
    assert "not the protocol's" not in text
    assert "not the same thing" not in text  # pruning changes nothing that a record compares
    assert "cache" not in text
    assert "4 of 6 questions of gqa" in text
    for one in BENCHMARKS:
        if one.wanted is not None:
            assert f"not the protocol's: {one.name} is {one.wanted.otherwise} in theirs" in table([theirs])
