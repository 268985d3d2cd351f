"""The paper's tasks offline: lmms-eval's own prompts, metrics and aggregation, on rows of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Real
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from tests.harness.lmms.conftest import Runs

pytest.importorskip("lmms_eval", reason="needs lmms-eval: make test-eval")

from lmms_eval.loggers import EvaluationTracker

from ocvtp.harness import answering, relative
from ocvtp.harness.conversations import count_pictures
from ocvtp.harness.protocol import BENCHMARKS, GROUP
from tests.vlm.hub_folders import write_folder

#: What each task reports.
METRICS = {
    one.task: sorted({metric for score in one.scores for metric in score.metrics}) for one in BENCHMARKS
}
#: Pictures of each question where it isn't one of each.
PICTURES = {
    "scienceqa_img": [1, 1, 0, 1, 1, 0],
    "seedbench": [1, 1, 1, 1, 3, 3],
    "mmmu_val": [2, 1, 2, 1, 2, 1],
}
TOKENS, KEPT = 16, 4  # of a picture
PRUNERS = {"none": "pruner=none", "a quarter": "pruner=random,keep=0.25"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaVA-1.5 of random weights."""
    return write_folder(tmp_path_factory.mktemp("hub"), "llava-hf/llava-1.5-7b-hf")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Conversations as the processor gets them."""
    seen: list[Any] = []
    tokenized = answering.tokenized

    def noted(processor: Any, conversations: Any) -> Any:
        seen.extend(conversations)
        return tokenized(processor, conversations)

    monkeypatch.setattr(answering, "tokenized", noted)
    return seen


def words(conversation: Any) -> str:
    """All that a conversation says."""
    return "\n".join(
        part["text"] for message in conversation for part in message["content"] if part["type"] == "text"
    )


@pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS)
def test_all_of_them(run: Runs, outside: list[Any], folder: Path, asked: list[Any], pruner: str) -> None:
    """Scores are there, counts are right, nobody calls the Hub or a judge; one by one makes no difference."""
    model = f"pretrained={folder},{pruner}"
    few = {"gen_kwargs": "max_new_tokens=4"}
    found = run(model, [GROUP], 4, **few)
    assert not outside
    results = found.found["results"]
    assert len(METRICS) == len(BENCHMARKS) == 11
    for task, metrics in METRICS.items():
        for metric in metrics:
            assert isinstance(results[task][f"{metric},none"], Real), (task, metric)
    kept = TOKENS if pruner == PRUNERS["none"] else KEPT
    for task in METRICS:
        counts = found.counts(task)
        pictures = PICTURES.get(task, [1] * len(counts))
        assert [each["images"] for each in counts] == pictures, task
        assert [each["vision_tokens"] for each in counts] == [TOKENS * n for n in pictures], task
        assert [each["kept_vision_tokens"] for each in counts] == [kept * n for n in pictures], task
    measured = found.record["measured"]
    assert measured["images"] == sum(count_pictures(conversation) for conversation in asked)
    assert measured["kept_vision_tokens_per_image"] == kept
    assert (found.record["report"] is None) == (pruner == PRUNERS["none"])
    said = {answer for task in METRICS for answer in found.answers(task)}
    assert len(said) > 6  # a model that says one thing would prove nothing
    alone = run(model, [one.asked or one.task for one in BENCHMARKS], 1, **few)
    for task in METRICS:
        assert alone.answers(task) == found.answers(task), task
        assert alone.counts(task) == found.counts(task), task
        scores = {f"{metric},none" for metric in METRICS[task]}
        assert {key: alone.found["results"][task][key] for key in scores} == {
            key: results[task][key] for key in scores
        }


@pytest.mark.parametrize(("said", "score"), [("B", 100 / 3), ("A", 0), ("I see no letter", 0)])
def test_mmbench_is_scored_by_rules(
    run: Runs, outside: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, score: float
) -> None:
    """B is right once of three; A would be, but is wrong where that question is asked in another order."""
    monkeypatch.setattr(PreTrainedTokenizerBase, "batch_decode", lambda _, rows, **__: [said] * len(rows))
    tasks = ("mmbench_en_dev", "mmbench_cn_dev")
    asked = [one.asked or one.task for one in BENCHMARKS if one.task in tasks]
    results = run(f"pretrained={folder},pruner=none", asked, 4, gen_kwargs="max_new_tokens=1").found[
        "results"
    ]
    assert [results[task]["gpt_eval_score,none"] for task in tasks] == pytest.approx([score, score])
    assert not outside


def test_text_in_pictures_is_told(run: Runs, folder: Path, asked: list[Any]) -> None:
    """TextVQA's questions as the paper's fork asked them; lmms-eval itself leaves the tokens out."""
    run(f"pretrained={folder},pruner=none", ["ocvtp_textvqa"], 4, gen_kwargs="max_new_tokens=1")
    told = [words(one) for one in asked]
    assert [text.splitlines()[1] for text in told] == [f"Reference OCR token: WORD, n{i}" for i in range(6)]
    assert all(text.startswith("What is written in picture") for text in told)
    assert all(text.endswith("Answer the question using a single word or phrase.") for text in told)


def test_system_sentence_and_squares(run: Runs, folder: Path, asked: list[Any]) -> None:
    """As LLaVA-1.5 was published."""
    model = f"pretrained={folder},pruner=none,system_prompt=vicuna_v1,pad_to_square=true"
    run(model, ["mmmu_val"], 1, gen_kwargs="max_new_tokens=1", limit=1)
    ((system, user),) = asked
    assert system["role"] == "system"
    assert system["content"][0]["text"].startswith("A chat between a curious user and an artificial")
    parts = [part["type"] for part in user["content"]]
    assert parts.count("image") == 2
    assert parts[-1] == "text"
    pictures = [part["image"] for part in user["content"] if part["type"] == "image"]
    assert [picture.size for picture in pictures] == [(176, 176), (192, 192)]
    assert pictures[0].getpixel((88, 0)) == (122, 116, 104)  # int(255 * CLIP's mean)


def test_results_make_the_table(
    run: Runs, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lmms-eval writes of two runs is what the table reads: no score is missing."""
    names = {"all": "pruner=none", "quarter": "pruner=random,keep=0.25"}
    for name, pruner in names.items():
        tracker = EvaluationTracker(output_path=str(tmp_path / name))
        found = run(
            f"pretrained={folder},{pruner}",
            [GROUP],
            4,
            gen_kwargs="max_new_tokens=2",
            evaluation_tracker=tracker,
        ).found
        samples = found.pop("samples")
        tracker.save_results_aggregated(found, samples, "2026-12-01T00:00:00")
        assert len(list((tmp_path / name).rglob("*_results.json"))) == 1
    capsys.readouterr()
    assert relative.main([str(tmp_path / name) for name in names]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in lines] == [lines[0].count("|")] * 4  # with head and rule
    for one in BENCHMARKS:
        assert one.name in lines[0]
    assert "missing" not in "".join(lines)
    assert f"| {TOKENS:.1f} |" in lines[2]
    assert f"| {KEPT:.1f} |" in lines[3]
