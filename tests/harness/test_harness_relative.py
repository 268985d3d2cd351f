"""The table of finished runs: shares, means, what is missing, and what can't be compared."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ocvtp.harness.protocol import BENCHMARKS
from ocvtp.harness.relative import average, main, shares, table, to_json
from ocvtp.harness.results import NoResultsError, Row, read_row

#: As lmms-eval 0.7.3 wrote it, but for the scores, which are made up.
RECORDED = Path(__file__).parents[1] / "data" / "lmms_eval_results.json"
#: Of the unpruned model: by task, the metrics that lmms-eval reports.
WHOLE = {
    "gqa": {"exact_match": 0.6},
    "mmbench_en_dev": {"gpt_eval_score": 64.0},
    "mmbench_cn_dev": {"gpt_eval_score": 58.0},
    "mme": {"mme_perception_score": 1500.0, "mme_cognition_score": 350.0},
    "pope": {"pope_accuracy": 0.8, "pope_precision": 0.9, "pope_recall": 0.8, "pope_f1_score": 0.9},
    "scienceqa_img": {"exact_match": 0.7},
    "textvqa_val": {"exact_match": 0.5},
    "vqav2_val": {"exact_match": 0.8},
    "seedbench": {"seed_image": 0.66, "seed_video": 0.4, "seed_all": 0.6},
    "vizwiz_vqa_val": {"exact_match": 0.5},
    "mmmu_val": {"mmmu_acc": 0.36},
}
LETTERS = {"keep": 64, "pruner": "GarryLarry0131/OC-VTP"}


def results(
    scores: dict[str, dict[str, Any]], *, pruned: bool = False, images: int = 10, **settings: Any
) -> dict[str, Any]:
    """A results file: the recorded one with other scores and settings."""
    found = json.loads(RECORDED.read_text(encoding="utf-8"))
    task = found["configs"].pop("recorded")
    found["results"] = {
        "ocvtp_paper": {"alias": "ocvtp_paper", " ": " "},
        **{
            name: {
                "alias": name,
                **{f"{metric},none": value for metric, value in metrics.items()},
                **{f"{metric}_stderr,none": "N/A" for metric in metrics},
            }
            for name, metrics in scores.items()
        },
    }
    found["configs"] = {name: {**copy.deepcopy(task), "task": name} for name in scores}
    for name in set(found["configs"]) & {"mmbench_en_dev", "mmbench_cn_dev"}:
        found["configs"][name]["metric_list"] = [
            {"metric": "gpt_eval_score", "aggregation": "<function mmbench at 0x7efc5690a660>"}
        ]
    if "textvqa_val" in scores:
        found["configs"]["textvqa_val"]["lmms_eval_specific_kwargs"] = {"default": {"ocr": True}}
    found["n-samples"] = {name: {"original": 100, "effective": 100} for name in scores}
    (record,) = found["config"]["batch_sizes"]
    record["settings"] |= settings
    record["pruner"]["name"] = settings.get("pruner", "none")
    record["report"] = {"tokens_after": settings.get("keep")} if pruned else None
    record["settings"].setdefault("keep", None)
    record["model"]["config_sha256"] = "c1"
    record["processor"] = {"sha256": "f0", "image_processor": {"do_pad": False}}
    record |= {"generation": {}, "text_encoder_sha256": None}
    kept = settings.get("keep", 576)
    record["measured"] |= {
        "requests": 100 * len(scores),
        "images": images,
        "kept_vision_tokens_per_image": kept,
    }
    record["measured"] |= {"vision_tokens_per_image_in_layers": kept, "seconds_per_image": kept / 1000}
    return found


def scaled(share: float, *without: str) -> dict[str, dict[str, Any]]:
    return {
        task: {name: value * share for name, value in metrics.items()}
        for task, metrics in WHOLE.items()
        if task not in without
    }


def write(folder: Path, found: Any, name: str = "20260101_000000") -> Path:
    inner = folder / "llava-hf__llava-1.5-7b-hf"
    inner.mkdir(parents=True, exist_ok=True)
    text = found if isinstance(found, str) else json.dumps(found)
    (inner / f"{name}_results.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def none(tmp_path: Path) -> Path:
    return write(tmp_path / "none", results(WHOLE))


def printed(
    capsys: pytest.CaptureFixture[str], *words: object, code: int = 0
) -> tuple[list[dict[str, str]], str]:
    """Rows of the table by column, and what stands below it."""
    assert main([str(word) for word in words]) == code
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, _, *rows = cells
    return [dict(zip(head, row, strict=True)) for row in rows], "\n".join(
        line for line in lines if not line.startswith("|")
    )


def test_shares_and_their_mean(tmp_path: Path, none: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = scaled(0.9)
    found["gqa"] = {"exact_match": 0.3}
    pruned = write(tmp_path / "pruner-64", results(found, pruned=True, **LETTERS))
    (first, second), below = printed(capsys, none, pruned)
    assert first[""] == "none"
    assert first["GQA"] == "0.6 (100.0)"
    assert first["average of 11"] == "100.0"
    assert second["GQA"] == "0.3 (50.0)"
    assert second["MME P+C"] == "1665 (90.0)"
    assert second["MME P"] == "1350 (90.0)"
    assert (second["POPE F1"], second["POPE accuracy"]) == ("0.81 (90.0)", "0.72 (90.0)")
    assert (second["SEED all"], second["SEED image"]) == ("0.54 (90.0)", "0.594 (90.0)")
    assert second["average of 11"] == f"{(10 * 90 + 50) / 11:.1f}"
    assert (first["method"], second["method"]) == ("none", "OC-VTP 64")
    assert (first["tokens"], second["tokens"]) == ("576.0", "64.0")
    assert second["s/image"] == "0.064"
    assert "not the same thing" not in below
    assert "MMB-CN" in below


def test_ten_are_without_the_eleventh(tmp_path: Path, none: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = scaled(0.9)
    found["mmbench_cn_dev"] = {"gpt_eval_score": 29.0}
    pruned = write(tmp_path / "64", results(found, pruned=True, **LETTERS))
    (_, second), _ = printed(capsys, none, pruned, "--ten")
    assert "MMB-CN" not in second
    assert second["average of 10"] == "90.0"


def test_scores_that_can_be_read_in_several_ways(tmp_path: Path, none: Path) -> None:
    found = scaled(0.9)
    found["mme"] = {"mme_perception_score": 1500.0, "mme_cognition_score": 165.0}  # 90 % together, 100 alone
    found["pope"] |= {"pope_f1_score": 0.9 * 0.9, "pope_accuracy": 0.8 * 0.8}
    row = read_row(write(tmp_path / "64", results(found, pruned=True, **LETTERS)))
    mean = average(row, read_row(none), BENCHMARKS)
    assert mean.value == pytest.approx(90)
    assert mean.low == pytest.approx(90 - 10 / 11)
    assert mean.high == pytest.approx(90 + 10 / 11)
    assert "90.0 (89.1 to 90.9)" in table([read_row(none), row])


def test_missing_is_said_and_in_no_mean(
    tmp_path: Path, none: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = scaled(0.9, "vqav2_val", "mmmu_val")
    found["gqa"] = {"exact_match": 0.3}
    some = write(tmp_path / "some", results(found, pruned=True, **LETTERS))
    whole = write(tmp_path / "whole", results(scaled(0.8), pruned=True, **LETTERS))
    (_, second, third), below = printed(capsys, none, some, whole)
    assert (second["VQAv2"], second["MMMU"]) == ("missing", "missing")
    assert second["average of 11"] == f"{(8 * 90 + 50) / 9:.1f}, 9 of 11"
    assert third["average of 11"] == "80.0"
    assert "some: not in the average: VQAv2, MMMU" in below
    again = re.search(r"those that all rows have \((.*)\): (.*)", below)
    assert again is not None
    assert again[1] == "GQA, MMB, MMB-CN, MME, POPE, SQA, TextVQA, SEED, VizWiz"
    assert again[2] == f"none 100.0, some {(8 * 90 + 50) / 9:.1f}, whole 80.0"


def test_what_nobody_ran_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {name: WHOLE[name] for name in ("gqa", "pope")}
    first = write(tmp_path / "none", results(few))
    (row,), below = printed(capsys, first)
    assert "VQAv2" not in row
    assert row["average of 2"] == "100.0"
    assert "no run has results of MMB, MMB-CN, MME, SQA, TextVQA, VQAv2, SEED, VizWiz, MMMU" in below


@pytest.mark.parametrize("bad", [float("nan"), "N/A", None, True])
def test_what_is_no_number_is_missing(tmp_path: Path, none: Path, bad: object) -> None:
    found = scaled(0.9)
    found["mme"]["mme_cognition_score"] = bad
    row = read_row(write(tmp_path / "64", results(found, pruned=True, **LETTERS)))
    assert ("MME", "P+C") not in row.scores
    assert row.scores["MME", "P"] == 1350
    mean = average(row, read_row(none), BENCHMARKS)
    assert mean.missing == ("MME",)  # perception alone does not stand in for the sum
    assert len(mean.of) == 10


def test_no_share_of_nothing(tmp_path: Path) -> None:
    base = copy.deepcopy(WHOLE)
    base["gqa"] = {"exact_match": 0.0}
    first = read_row(write(tmp_path / "none", results(base)))
    row = read_row(write(tmp_path / "64", results(scaled(0.9), pruned=True, **LETTERS)))
    assert ("GQA", "") not in shares(row, first)
    assert "| 0.54 (no share) |" in table([first, row])
    assert average(row, first, BENCHMARKS).missing == ("GQA",)


def test_a_score_of_nothing_counts(tmp_path: Path, none: Path) -> None:
    found = scaled(1.0)
    found["gqa"] = {"exact_match": 0.0}
    row = read_row(write(tmp_path / "64", results(found, pruned=True, **LETTERS)))
    mean = average(row, read_row(none), BENCHMARKS)
    assert mean.value == pytest.approx(1000 / 11)
    assert not mean.missing


def test_the_newest_of_several_runs(tmp_path: Path) -> None:
    folder = tmp_path / "64"
    old = results({"gqa": {"exact_match": 0.1}, "pope": WHOLE["pope"]}, pruned=True, images=30, **LETTERS)
    old["config"]["batch_sizes"][0]["measured"]["seconds_per_image"] = 0.2
    new = results({"gqa": {"exact_match": 0.5}}, pruned=True, images=10, **LETTERS)
    new["config"]["batch_sizes"][0]["measured"]["seconds_per_image"] = 0.4
    write(folder, new, "20260102_000000")
    write(folder, old, "20260101_235959")
    row = read_row(folder)
    assert row.scores["GQA", ""] == 0.5
    assert row.scores["POPE", "F1"] == 0.9
    assert row.measured("seconds_per_image") == pytest.approx((0.2 * 30 + 0.4 * 10) / 40)


def test_a_superseded_run_has_no_say(tmp_path: Path) -> None:
    folder = tmp_path / "64"
    write(folder, results({"gqa": {"exact_match": 0.1}}, pruned=True, keep=8, pruner="grid"), "20260101")
    write(folder, results({"gqa": {"exact_match": 0.5}}, pruned=True, **LETTERS), "20260102")
    row = read_row(folder)
    assert len(row.runs) == 1
    assert row.measured("kept_vision_tokens_per_image") == 64


def test_a_folder_of_several_settings_is_told(tmp_path: Path, none: Path) -> None:
    folder = tmp_path / "both"
    write(folder, results({"gqa": WHOLE["gqa"]}, pruned=True, pruner="grid", keep=64), "20260101")
    write(folder, results({"pope": WHOLE["pope"]}, pruned=True, pruner="grid", keep=128), "20260102")
    assert "- both holds runs of several settings: keep\n" in table([read_row(none), read_row(folder)]) + "\n"


RECORD = ["config", "batch_sizes", 0]


def put(found: Any, path: list[Any], value: Any) -> None:
    for name in path[:-1]:
        found = found[name]
    found[path[-1]] = value


def changed(path: list[Any], value: Any) -> dict[str, Any]:
    """Results of a pruned run that differ from the unpruned in one thing more."""
    found = results(scaled(0.9), pruned=True, **LETTERS)
    put(found, path, value)
    return found


@pytest.mark.parametrize(
    ("path", "value", "mixed"),
    [
        ([*RECORD, "settings", "layout"], "official", "layout"),
        ([*RECORD, "settings", "fill"], "own", "fill"),
        ([*RECORD, "settings", "refine"], 2, "refine"),
        ([*RECORD, "settings", "text_encoder"], "another/clip", "text_encoder"),
        ([*RECORD, "settings", "seed"], 1, "seed"),
        ([*RECORD, "pruner", "sha256"], "other", "the pruner's weights"),
        ([*RECORD, "settings", "resume"], "elsewhere", ""),
        ([*RECORD, "settings", "batch_size"], 8, ""),
        ([*RECORD, "settings", "device"], "cuda:1", ""),
        ([*RECORD, "settings", "device_map"], "auto", ""),
    ],
)
def test_which_settings_a_folder_may_mix(
    tmp_path: Path, none: Path, path: list[Any], value: Any, mixed: str
) -> None:
    options = {**LETTERS, "layout": "auto", "fill": "auto", "refine": 0, "seed": 0}
    first = results({"gqa": WHOLE["gqa"]}, pruned=True, **options)
    second = results({"pope": WHOLE["pope"]}, pruned=True, **options)
    put(second, path, value)
    folder = tmp_path / "both"
    write(folder, first, "20260101")
    write(folder, second, "20260102")
    found = [line for line in table([read_row(none), read_row(folder)]).splitlines() if "several" in line]
    assert found == ([f"- both holds runs of several settings: {mixed}"] if mixed else [])


@pytest.mark.parametrize(
    ("path", "value", "note"),
    [
        ([*RECORD, "versions", "torch"], "1.0", "version of torch is .* in none, 1.0 in 64"),
        ([*RECORD, "settings", "dtype"], "bfloat16", "dtype is .*bfloat16 in 64"),
        ([*RECORD, "settings", "system_prompt"], "Be brief.", "system_prompt is .*Be brief. in 64"),
        ([*RECORD, "settings", "pad_to_square"], True, "pad_to_square is false in none, true in 64"),
        ([*RECORD, "settings", "chat_template"], "x" * 90, r"chat_template is .*'x+'\.\.\. \(.*\) in 64"),
        ([*RECORD, "model", "sample_sha256"], "other", "the model's weights is .* in none, other in 64"),
        (
            [*RECORD, "model", "config_sha256"],
            "other",
            "the model's configuration is c1 in none, other in 64",
        ),
        ([*RECORD, "processor", "sha256"], "other", "the processor is f0 in none, other in 64"),
        (
            [*RECORD, "processor", "image_processor", "do_pad"],
            True,
            "do_pad of the image processor is false in none, true in 64",
        ),
        (
            [*RECORD, "generation"],
            {"repetition_penalty": 1.05},
            r'the generation configuration is {} in none, {"repetition_penalty": 1.05} in 64',
        ),
        (["config", "limit"], 50.0, "limit is null in none, 50.0 in 64"),
        (["config", "gen_kwargs"], "temperature=1", "gen_kwargs is null in none, temperature=1 in 64"),
        (
            ["n-samples", "pope", "effective"],
            99,
            "number of pope's questions is 100 in none, 99 in 64",
        ),
        (
            ["configs", "textvqa_val", "lmms_eval_specific_kwargs"],
            {"ocr": True},
            'lmms_eval_specific_kwargs of textvqa_val is .*{"ocr": true} in 64',
        ),
    ],
)
def test_what_rows_do_not_share_is_told(
    tmp_path: Path, none: Path, path: list[Any], value: Any, note: str
) -> None:
    same = read_row(write(tmp_path / "same", results(scaled(0.9), pruned=True, **LETTERS)))
    other = read_row(write(tmp_path / "64", changed(path, value)))
    base = read_row(none)
    assert "not the same thing" not in table([base, same])
    found = [line for line in table([base, other]).splitlines() if "not the same thing" in line]
    assert len(found) == 1
    assert re.search(note, found[0])


@pytest.mark.parametrize(
    "path",
    [["model", "config_sha256"], ["processor"], ["generation"], ["text_encoder_sha256"]],
    ids=lambda path: path[-1],
)
def test_a_record_without_new_parts_is_no_difference(tmp_path: Path, none: Path, path: list[str]) -> None:
    found = results(scaled(0.9), pruned=True, **LETTERS)
    record = found["config"]["batch_sizes"][0]
    del (record if len(path) == 1 else record[path[0]])[path[-1]]
    assert "not the same thing" not in table([read_row(none), read_row(write(tmp_path / "64", found))])


def test_text_encoders_of_rows_that_have_one(tmp_path: Path, none: Path) -> None:
    path = [*RECORD, "text_encoder_sha256"]
    rows = [
        read_row(write(tmp_path / name, changed(path, name), "20260101")) for name in ("trim", "cdpruner")
    ]
    start = "not the same thing is compared: the text encoder is "
    assert start not in table([read_row(none), rows[0]])
    assert f"{start}trim in trim, cdpruner in cdpruner" in table([read_row(none), *rows])


def test_a_part_of_the_questions_is_told(tmp_path: Path) -> None:
    """All rows alike, so that nothing differs."""
    rows = []
    for name in ("none", "64"):
        found = results({"gqa": WHOLE["gqa"], "pope": WHOLE["pope"]}, pruned=name != "none")
        found["config"]["limit"] = 50.0
        found["n-samples"]["gqa"]["effective"] = 50
        rows.append(read_row(write(tmp_path / name, found)))
    text = table(rows)
    assert "- not all questions were asked: 50 of 100 questions of gqa (in none, 64)" in text
    assert "called with" not in text
    assert "not the same thing" not in text


def test_an_offset_leaves_questions_out(tmp_path: Path) -> None:
    """lmms-eval counts those before it as answered."""
    found = results({"gqa": WHOLE["gqa"]})
    found["config"] |= {"offset": 30, "limit": 80.0}
    found["n-samples"]["gqa"]["effective"] = 80
    row = read_row(write(tmp_path / "none", found))
    assert row.counts == {"gqa": 70}
    assert "not all questions were asked: 70 of 100 questions of gqa (in none)" in table([row])


@pytest.mark.parametrize(("limit", "told"), [(500.0, True), (-1.0, False), (None, False)])
def test_a_limit_is_told_whatever_it_left_out(tmp_path: Path, limit: float | None, told: bool) -> None:
    found = results({"gqa": WHOLE["gqa"]})
    found["config"]["limit"] = limit
    text = table([read_row(write(tmp_path / "none", found))])
    assert ("- lmms-eval was called with --limit 500.0 (in none)" in text) == told
    assert ("called with" in text) == told
    assert "not all questions" not in text


def test_text_without_its_tokens_is_told(tmp_path: Path) -> None:
    """All rows alike, so that nothing differs."""
    rows, good = [], []
    for name in ("none", "64"):
        found = results({"textvqa_val": WHOLE["textvqa_val"]}, pruned=name != "none")
        good.append(read_row(write(tmp_path / "good" / name, found)))
        found["configs"]["textvqa_val"]["lmms_eval_specific_kwargs"] = {"default": {"ocr": False}}
        rows.append(read_row(write(tmp_path / name, found)))
    assert "- TextVQA: wanted with OCR tokens in the prompt" in table(good)
    assert "not the protocol's" not in table(good)
    note = "- not the protocol's: TextVQA is asked without OCR tokens in the prompt in "
    assert table(rows).endswith(f"{note}none, 64")
    assert f"{note}64\n" in table([good[0], rows[1]])


@pytest.mark.parametrize(("name", "task"), [("MMB", "mmbench_en_dev"), ("MMB-CN", "mmbench_cn_dev")])
def test_a_judge_is_told(tmp_path: Path, name: str, task: str) -> None:
    found = results({task: WHOLE[task]})
    assert "not the protocol's" not in table([read_row(write(tmp_path / "rules", found))])
    found["configs"][task]["metric_list"][0]["aggregation"] = (
        "<function mmbench_aggregate_dev_results_eval at 0x7efc5690a660>"
    )
    text = table([read_row(write(tmp_path / "none", found))])
    assert re.search(
        rf"not the protocol's: {name} is scored by lmms-eval's own metric, .* in none$", text, re.M
    )


def test_a_file_without_settings_of_a_task_is_told(tmp_path: Path) -> None:
    found = results({"textvqa_val": WHOLE["textvqa_val"]})
    del found["configs"]
    text = table([read_row(write(tmp_path / "none", found))])
    assert "whether TextVQA is the protocol's is not known in none" in text


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (["config", "use_cache"], "a/folder", True),
        (["config", "resolved_cli_args", "use_cache"], "a/folder", False),  # config itself says null
        ([*RECORD, "measured"], None, True),
        ([*RECORD, "measured", "requests"], 1099, True),
        ([*RECORD, "measured", "requests"], 1200, False),  # some are asked several times
    ],
)
def test_answers_of_a_cache_are_told(
    tmp_path: Path, none: Path, path: list[Any], value: Any, told: bool
) -> None:
    text = table([read_row(none), read_row(write(tmp_path / "64", changed(path, value)))])
    assert ("answers may be from lmms-eval's cache (--use_cache) in 64: " in text) == told


def test_a_part_of_the_questions_is_no_cache(tmp_path: Path) -> None:
    found = results({"gqa": WHOLE["gqa"]})
    found["config"] |= {"offset": 30, "limit": 80.0}
    found["n-samples"]["gqa"]["effective"] = 80
    found["config"]["batch_sizes"][0]["measured"]["requests"] = 70
    assert "cache" not in table([read_row(write(tmp_path / "none", found))])


def test_a_run_without_seconds(tmp_path: Path, none: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a resumed run's, only those of its batch size and device are; there may be none."""
    found = changed([*RECORD, "device"], "NVIDIA H200")
    del found["config"]["batch_sizes"][0]["measured"]["seconds_per_image"]
    (_, second), below = printed(capsys, none, write(tmp_path / "64", found))
    assert (second["s/image"], second["tokens"]) == ("", "64.0")
    assert "seconds can't be compared" not in below


def test_addresses_of_functions_are_no_difference(tmp_path: Path, none: Path) -> None:
    found = results(scaled(0.9), pruned=True, **LETTERS)
    for task in found["configs"].values():
        task["metric_list"] = json.loads(re.sub("0x[0-9a-f]+", "0x1234", json.dumps(task["metric_list"])))
    assert found["configs"]["gqa"]["metric_list"] != results(WHOLE)["configs"]["gqa"]["metric_list"]
    assert "not the same thing" not in table([read_row(none), read_row(write(tmp_path / "64", found))])


@pytest.mark.parametrize(
    ("path", "value", "note"),
    [([*RECORD, "device"], "NVIDIA H200", "device"), ([*RECORD, "settings", "batch_size"], 32, "batch_size")],
)
def test_seconds_of_another_kind(tmp_path: Path, none: Path, path: list[Any], value: Any, note: str) -> None:
    text = table([read_row(none), read_row(write(tmp_path / "64", changed(path, value)))])
    assert f"seconds can't be compared: {note} is " in text
    assert "not the same thing" not in text


def test_another_model_of_lmms_eval(tmp_path: Path, none: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(scaled(0.9))
    found["config"]["batch_sizes"] = []
    (_, second), below = printed(capsys, none, write(tmp_path / "llava_hf", found))
    assert second[""] == "llava_hf"
    assert second["method"] == second["tokens"] == second["s/image"] == ""
    assert second["average of 11"] == "90.0"
    assert "settings and versions are not known, or not of every run: llava_hf" in below


def test_a_first_row_that_is_pruned(tmp_path: Path, none: Path) -> None:
    pruned = read_row(write(tmp_path / "64", results(scaled(0.9), pruned=True, **LETTERS)))
    note = "the first row, 64, is pruned itself"
    assert note in table([pruned, read_row(none)])
    assert note not in table([read_row(none), pruned])


def test_inside_the_language_model(tmp_path: Path, none: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(scaled(0.9), pruned=True, pruner="fastv", keep=64)
    figures = found["config"]["batch_sizes"][0]["measured"]
    figures |= {"kept_vision_tokens_per_image": 576, "vision_tokens_per_image_in_layers": 64.12}
    (_, second), _ = printed(capsys, none, write(tmp_path / "fastv-64", found))
    assert (second["method"], second["tokens"]) == ("fastv 64", "576.0 (64.1)")


def test_how_tokens_were_merged_is_in_the_row(tmp_path: Path) -> None:
    merged = results(WHOLE, pruned=True, pruner="a/folder/", keep=64, merge="projected", weigh=True)
    text = table([read_row(write(tmp_path / "64", merged))])
    assert "| folder 64, merged and weighed |" in text


def test_folders_of_one_name(tmp_path: Path, none: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write(tmp_path / "b" / "none", results(scaled(0.9)))
    rows, _ = printed(capsys, none, other)
    assert [row[""] for row in rows] == [str(none), str(other)]


def test_a_run_that_failed_is_a_row(tmp_path: Path, none: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "64" / "model").mkdir(parents=True)
    (_, second), below = printed(capsys, none, tmp_path / "64", code=1)
    assert second["GQA"] == second["average of 11"] == "missing"
    assert f"{tmp_path / '64'} has no *_results.json: its run failed" in below


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"results": {', "can't be read"),
        ("[]", "no results file of lmms-eval"),
        ('{"results": 3}', "no results file of lmms-eval"),
        ('{"results": {"mmvet": {"gpt_eval_score,none": 30.1}}}', "has results of mmvet, and of none of the"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    folder = write(tmp_path / "64", text)
    with pytest.raises(NoResultsError, match=message) as caught:
        read_row(folder)
    assert str(folder) in str(caught.value)


def test_without_the_unpruned_there_is_no_table(
    tmp_path: Path, none: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "nowhere"), str(none)])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert f"the first row is what shares are of: no folder {tmp_path / 'nowhere'}" in err


def test_for_programs(tmp_path: Path, none: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pruned = write(tmp_path / "64", results(scaled(0.9, "pope"), pruned=True, **LETTERS))
    file = tmp_path / "table.json"
    assert main([str(none), str(pruned), "--json", str(file)]) == 0
    first, second = json.loads(file.read_text(encoding="utf-8"))
    assert first["average"]["value"] == 100
    assert second["shares"]["MME P+C"] == pytest.approx(90)
    assert "POPE F1" not in second["scores"]
    assert second["average"]["missing"] == ["POPE"]
    assert second["average"]["value"] == pytest.approx(90)
    assert second["questions"]["gqa"] == 100
    assert second["record"]["settings"]["keep"] == 64
    assert [row["label"] for row in to_json([Row("a"), Row("b")])] == ["a", "b"]
    with pytest.raises(SystemExit):
        main([str(none), "--json", str(tmp_path / "no" / "where.json")])
    assert "--json" in capsys.readouterr().err
