"""What the paper (arXiv 2511.20439) ran, as data: benchmarks, models, budgets, and what is not known of them.

Sources, named in the entries: "paper"; "fork", the lmms-eval inside its official repository (bbd344ee, 0.5.0,
read at GarryLarry010131/OC-VTP 1755633); "lmms-eval", 0.7.3; "memory", numbers of questions that we did not
look up; "inferred".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """One way to score a benchmark.

    Attributes:
        name: for tables.
        metrics: of lmms-eval's task; their sum is the score.
        why: what speaks for it, where there are several.
    """

    name: str
    metrics: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class Wanted:
    """What a run's settings of a task must have, so that it was asked and scored as the protocol has it.

    Attributes:
        holds: of ``configs[task]`` in lmms-eval's results: whether they have.
        otherwise: what the run is where they have not, for notes.
    """

    holds: Callable[[Mapping[str, Any]], bool]
    otherwise: str


@dataclass(frozen=True)
class Benchmark:
    """A column of the table.

    Attributes:
        name: the paper's.
        task: lmms-eval's, by which results are found.
        asked: what ``--tasks`` is told, where that is a group of ours; empty: the task.
        split: of the data.
        questions: about how many (memory).
        scores: ways to score it; the first is counted unless another is asked for.
        login: whether lmms-eval 0.7.3 asks the Hub for the data with a token.
        judge: how a judge or a submission server is avoided; empty: there is none.
        wanted: of a run's settings of the task; ``None``: lmms-eval's own are the protocol's.
        note: what else to know.
    """

    name: str
    task: str
    split: str
    questions: int
    scores: tuple[Score, ...]
    asked: str = ""
    login: bool = False
    judge: str = ""
    wanted: Wanted | None = None
    note: str = ""


def _told_ocr(task: Mapping[str, Any]) -> bool:
    """TextVQA's; lmms-eval spreads what is under "default" before it asks, where that is what it takes."""
    said = task.get("lmms_eval_specific_kwargs")
    said = said if isinstance(said, Mapping) else {}
    default = said.get("default")
    return {**(default if isinstance(default, Mapping) else {}), **said}.get("ocr") is True


def _by_rules(task: Mapping[str, Any]) -> bool:
    """MMBench's score is by :func:`ocvtp.harness.tasks.paper.mmbench`, a function that is written as text."""
    metrics = task.get("metric_list")
    ways = [
        str(metric.get("aggregation"))
        for metric in (metrics if isinstance(metrics, list) else ())
        if isinstance(metric, Mapping) and metric.get("metric") == "gpt_eval_score"
    ]
    return len(ways) == 1 and re.search(r"\bmmbench\b", ways[0]) is not None


_VQA = (Score("", ("exact_match",)),)
_CIRCULAR = (Score("", ("gpt_eval_score",)),)
_RULES = "scored by rules alone; lmms-eval's own task asks GPT about answers that it can't read"
_OCR_WANTED = Wanted(_told_ocr, "asked without OCR tokens in the prompt")
_RULES_WANTED = Wanted(
    _by_rules, "scored by lmms-eval's own metric, which asks GPT, or draws at random, where it can't read"
)

BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("GQA", "gqa", "testdev_balanced", 12_600, (Score("", ("exact_match",)),), login=True),
    Benchmark(
        "MMB",
        "mmbench_en_dev",
        "dev",
        4_300,
        _CIRCULAR,
        asked="ocvtp_mmb",
        login=True,
        judge=_RULES,
        wanted=_RULES_WANTED,
    ),
    Benchmark(
        "MMB-CN",
        "mmbench_cn_dev",
        "dev",
        4_300,
        _CIRCULAR,
        asked="ocvtp_mmb_cn",
        login=True,
        judge=_RULES,
        wanted=_RULES_WANTED,
        note="whether the tenth of the paper is this one or MMMU is inferred",
    ),
    Benchmark(
        "MME",
        "mme",
        "test",
        2_400,
        (
            Score("P+C", ("mme_perception_score", "mme_cognition_score"), "what pruning papers print"),
            Score("P", ("mme_perception_score",), "what LLaVA's papers print"),
        ),
        login=True,
        note="which of the two the paper means is not known",
    ),
    Benchmark(
        "POPE",
        "pope",
        "test",
        9_000,
        (
            Score("F1", ("pope_f1_score",), "what LLaVA's papers print"),
            Score("accuracy", ("pope_accuracy",), "what lmms-eval lists first"),
        ),
        login=True,
        note="which of the two the paper means is not known",
    ),
    Benchmark("SQA", "scienceqa_img", "test", 2_000, (Score("", ("exact_match",)),), login=True),
    Benchmark(
        "TextVQA",
        "textvqa_val",
        "validation",
        5_000,
        _VQA,
        asked="ocvtp_textvqa",
        judge="the test split has a server; this is the validation split",
        wanted=_OCR_WANTED,
        note="wanted with OCR tokens in the prompt, as the fork has it; lmms-eval leaves them out",
    ),
    Benchmark(
        "VQAv2",
        "vqav2_val",
        "validation",
        214_000,
        _VQA,
        login=True,
        judge="the test split has a server; this is the validation split",
        note="whether the paper took val or test is not known; vqav2_val_lite has a few hundred questions",
    ),
    Benchmark(
        "SEED",
        "seedbench",
        "test",
        18_000,
        (
            Score("all", ("seed_all",), "58.6 of LLaVA-1.5, which pruning papers print, is this"),
            Score("image", ("seed_image",), "without the questions about videos"),
        ),
        login=True,
    ),
    Benchmark(
        "VizWiz",
        "vizwiz_vqa_val",
        "val",
        4_300,
        _VQA,
        judge="the test split has a server; this is the validation split",
    ),
    Benchmark(
        "MMMU",
        "mmmu_val",
        "validation",
        900,
        (Score("", ("mmmu_acc",)),),
        note="the fork lets it say 16 new tokens, lmms-eval 0.7.3 128; inferred, see MMB-CN",
    ),
)
#: The ten of the paper, as far as can be told: compiled files of the fork name the families that it imported,
#: and those without MMB-CN are ten (inferred).
TEN = tuple(one.name for one in BENCHMARKS if one.name != "MMB-CN")
#: The group of ``ocvtp/harness/tasks``: all of them.
GROUP = "ocvtp_paper"


@dataclass(frozen=True)
class Model:
    """Rows of the table.

    Attributes:
        name: on the command line.
        checkpoint: on the Hub, for transformers.
        arguments: ``--model_args`` that restore what was published, in order.
        budgets: of the paper's rows: tokens, or shares of them.
        tokens: vision tokens of an image, unpruned; ``None`` where images differ.
        family: its ``model_type``.
        depth: layers of the language model.
        pruner: official weights; ``None``: none are published.
        text_encoder: CLIP checkpoint that its tower was taken from, for methods that read the question.
        note: what else to know.
    """

    name: str
    checkpoint: str
    arguments: tuple[tuple[str, str], ...]
    budgets: tuple[int | float, ...]
    tokens: int | None
    family: str
    depth: int
    pruner: str | None
    text_encoder: str | None = None
    note: str = ""


_OFFICIAL = "GarryLarry0131/OC-VTP"
_CLIP = "openai/clip-vit-large-patch14-336"

MODELS: dict[str, Model] = {
    one.name: one
    for one in (
        Model(
            "llava-1.5-7b",
            "llava-hf/llava-1.5-7b-hf",
            # Fork, with liuhaotian/llava-v1.5-7b: fp16, pictures on a square of the mean colour
            # (image_aspect_ratio=pad), the system sentence of vicuna_v1. llava-hf's processor crops, and its
            # template has no such sentence.
            (("dtype", "float16"), ("pad_to_square", "true"), ("system_prompt", "vicuna_v1")),
            (192, 128, 64),
            576,
            "llava",
            32,
            _OFFICIAL,
            _CLIP,
        ),
        Model(
            "llava-next-7b",
            "llava-hf/llava-v1.6-vicuna-7b-hf",
            # image_grid_pinpoints=[[672,672]]: fork (builder.py); 2880 tokens of every picture.
            (
                ("dtype", "float16"),
                ("system_prompt", "vicuna_v1"),
                ("image_grid_pinpoints", "[[672,672]]"),
                ("layout", "official"),
            ),
            (640, 320, 160),
            2880,
            "llava_next",
            32,
            _OFFICIAL,
            _CLIP,
        ),
        Model(
            "qwen2.5-vl-7b",
            "Qwen/Qwen2.5-VL-7B-Instruct",
            # min_pixels and max_pixels: what lmms-eval's own class for Qwen2.5-VL sets (0.7.3,
            # models/simple/qwen2_5_vl.py, __init__). The fork has that class as compiled files only.
            (("dtype", "bfloat16"), ("min_pixels", "200704"), ("max_pixels", "1605632")),
            # HiPrune's shares of a third, two ninths and one ninth; the paper's own budgets are not known.
            (0.334, 0.223, 0.112),
            None,
            "qwen2_5_vl",
            28,
            None,
            note="no pruner for this encoder is published: train one (docs/training.md), or compare methods",
        ),
    )
}


def benchmark_of(name: str) -> Benchmark:
    """The benchmark of a name or a task.

    Raises:
        ValueError: there is none; the message lists them.
    """
    for one in BENCHMARKS:
        if name.lower() in (one.name.lower(), one.task, one.asked):
            return one
    raise ValueError(f"no benchmark {name!r}; there are {', '.join(one.name for one in BENCHMARKS)}")
