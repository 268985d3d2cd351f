"""The paper's protocol hangs together: names, tasks and the group that asks them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ocvtp.harness.protocol import BENCHMARKS, GROUP, MODELS, TEN, Benchmark, benchmark_of
from ocvtp.harness.tasks import FOLDER
from ocvtp.harness.tasks.paper import mmbench


class Loader(yaml.SafeLoader):
    """Reads lmms-eval's files, whose functions are tags."""


Loader.add_constructor("!function", lambda loader, node: f"function {loader.construct_scalar(node)}")


def group(name: str) -> list[object]:
    """Entries of a group of ours."""
    found = yaml.load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), Loader)
    assert found["group"] == name
    return list(found["task"])


def test_the_group_asks_every_benchmark() -> None:
    assert group(GROUP) == [one.asked or one.task for one in BENCHMARKS]


@pytest.mark.parametrize("one", [one for one in BENCHMARKS if one.asked], ids=lambda one: one.name)
def test_a_group_of_one_asks_its_task(one: Benchmark) -> None:
    (entry,) = group(one.asked)
    assert isinstance(entry, dict)
    assert entry["task"] == one.task
    assert [metric["metric"] for metric in entry["metric_list"]] == [
        name for score in one.scores for name in score.metrics
    ]


def test_what_is_changed_of_their_tasks() -> None:
    (text,) = group("ocvtp_textvqa")
    assert isinstance(text, dict)
    assert text["lmms_eval_specific_kwargs"]["default"]["ocr"] is True
    for name in ("ocvtp_mmb", "ocvtp_mmb_cn"):
        (circular,) = group(name)
        assert isinstance(circular, dict)
        assert circular["metric_list"][0]["aggregation"] == "function paper.mmbench"


@pytest.mark.parametrize(
    ("said", "holds"),
    [
        ({"default": {"ocr": True}}, True),
        ({"ocr": True, "default": {"ocr": True}}, True),
        ({"ocr": True}, True),
        ({"default": {"ocr": False}}, False),
        ({"ocr": False, "default": {"ocr": True}}, False),
        ({"pre_prompt": ""}, False),
        ({"ocr": "true"}, False),
        (None, False),
    ],
)
def test_ocr_tokens_are_wanted(said: Any, holds: bool) -> None:
    wanted = benchmark_of("TextVQA").wanted
    assert wanted is not None
    assert wanted.holds({"lmms_eval_specific_kwargs": said}) is holds


@pytest.mark.parametrize("name", ["MMB", "MMB-CN"])
def test_rules_are_wanted(name: str) -> None:
    wanted = benchmark_of(name).wanted
    assert wanted is not None
    ours = {"metric": "gpt_eval_score", "aggregation": str(mmbench)}
    theirs = {**ours, "aggregation": "<function mmbench_aggregate_dev_results_eval at 0x7efc5690a660>"}
    sheet = {**theirs, "metric": "submission"}
    assert wanted.holds({"metric_list": [ours]})
    assert wanted.holds({"metric_list": [sheet, ours]})
    assert not wanted.holds({"metric_list": [theirs, sheet]})
    assert not wanted.holds({"metric_list": [sheet, {**ours, "metric": "submission"}]})
    assert not wanted.holds({})


def test_ten_of_eleven() -> None:
    assert len(TEN) == 10
    assert len({one.name for one in BENCHMARKS} - set(TEN)) == 1
    for names in ([one.name.lower() for one in BENCHMARKS], [one.task for one in BENCHMARKS]):
        assert len(set(names)) == len(names) == 11


def test_a_benchmark_by_any_of_its_names() -> None:
    for one in BENCHMARKS:
        for name in filter(None, (one.name, one.name.lower(), one.task, one.asked)):
            assert benchmark_of(name) is one
    with pytest.raises(ValueError, match=r"no benchmark 'mmvet'; there are GQA, .*MMMU"):
        benchmark_of("mmvet")


def test_scores_of_a_benchmark_have_names_of_their_own() -> None:
    for one in BENCHMARKS:
        assert len({score.name for score in one.scores}) == len(one.scores)
        assert len(one.scores) == 1 or all(score.name and score.why for score in one.scores)


def test_budgets_are_below_what_an_image_has() -> None:
    for model in MODELS.values():
        for budget in model.budgets:
            assert budget < (model.tokens if isinstance(budget, int) and model.tokens else 1)


def test_the_folder_is_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ocvtp.harness.tasks"], capture_output=True, text=True, check=True
    )
    assert (Path(done.stdout.rstrip("\n")) / f"{GROUP}.yaml").is_file()
