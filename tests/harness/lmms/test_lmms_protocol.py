"""The protocol against lmms-eval's own tasks, and printed commands against its parser."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed here: make test-eval")

import lmms_eval.tasks
from lmms_eval.loggers.evaluation_tracker import GeneralConfigTracker
from lmms_eval.utils import simple_parse_args_string

from ocvtp.harness.arguments import Arguments
from ocvtp.harness.commands import script
from ocvtp.harness.protocol import BENCHMARKS, MODELS, Benchmark

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
        model, methods=("pruner", "tome", "fastv"), pruner="a folder, of mine", out="some, runs", merged=True
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
