"""Rows for tasks of lmms-eval: the test bed's questions, and a few in the columns of the paper's tasks.

What the paper's tasks ask here is nonsense to a random model. Their prompts, metrics and aggregation are
lmms-eval's.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from bench.testbed.examples import Example, example

#: Of the test bed's test split, and questions about each.
PICTURES, QUESTIONS = 25, 8
#: Name of the task that :func:`write_testbed` writes.
TESTBED = "ocvtp_testbed"
_LETTERS = ("A", "B", "C", "D")
_TASK = """\
task: ocvtp_testbed
dataset_path: parquet
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files: {{test: {folder}/test.parquet}}
test_split: test
output_type: generate_until
doc_to_visual: !function seen.picture
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 1, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata:
  - version: 0.0
"""
_SEEN = """\
def picture(doc):
    return [doc["image"].convert("RGB")]
"""


@functools.cache
def examples() -> list[Example]:
    """Of the test split, as ``bench.accuracy`` asks them."""
    return [example("test", i, QUESTIONS) for i in range(PICTURES)]


def write_testbed(folder: Path) -> Path:
    """A folder for ``--include_path`` with a task about the test bed, and its 200 questions beside it."""
    folder.mkdir(parents=True)
    asked = [
        {"image": Image.fromarray(one.pixels), "question": question.text, "answer": question.answer}
        for one in examples()
        for question in one.questions
    ]
    pq.write_table(_table(asked, image=datasets.Image()), folder / "test.parquet")
    (folder / f"{TESTBED}.yaml").write_text(_TASK.format(folder=folder), encoding="utf-8")
    (folder / "seen.py").write_text(_SEEN, encoding="utf-8")
    return folder


@functools.cache
def paper_rows() -> dict[str, tuple[str, datasets.Dataset]]:
    """Of each repository's last name: the split, and rows as lmms-eval's task of it reads them."""
    one = {"image": datasets.Image()}
    several = {"image": datasets.Sequence(datasets.Image())}
    numbered = {f"image_{n}": datasets.Image() for n in range(1, 8)}
    made = {
        "GQA": ("testdev", _gqa(), one),
        "MMBench": ("dev", _mmbench(), one),
        "MME": ("test", _mme(), one),
        "MMMU": ("validation", _mmmu(), numbered),
        "POPE": ("test", _pope(), one),
        "ScienceQA": ("test", _scienceqa(), one),
        "SEED-Bench": ("test", _seedbench(), several),
        "textvqa": ("validation", _textvqa(), one),
        "VizWiz-VQA": ("val", [{**row, "question_id": str(row["question_id"])} for row in _textvqa()], one),
        "VQAv2": ("validation", _vqav2(), one),
    }
    return {
        # Without a fingerprint datasets pickles the table, which it can't with every pyarrow.
        name: (split, datasets.Dataset(_table(rows, **pictures), fingerprint=name))
        for name, (split, rows, pictures) in made.items()
    }


def _table(rows: list[dict[str, Any]], **pictures: Any) -> pa.Table:
    """Rows as ``datasets`` stores them, with the types of the columns that have pictures."""
    table = pa.Table.from_pylist([{name: _stored(value) for name, value in row.items()} for row in rows])
    features = datasets.Features.from_arrow_schema(table.schema)
    features.update(pictures)
    return table.cast(features.arrow_schema)


def _stored(value: Any) -> Any:
    """Pictures as PNG."""
    if isinstance(value, list):
        return [_stored(item) for item in value]
    if not isinstance(value, Image.Image):
        return value
    file = io.BytesIO()
    value.save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def _picture(number: int) -> Image.Image:
    """Not all of one shape."""
    return Image.fromarray(examples()[number].pixels).resize((160 + 16 * (number % 5), 128))


def _pope() -> list[dict[str, Any]]:
    return [
        {
            "image": _picture(i),
            "question": f"Is there a thing of kind {i % 7} in the image?",
            "answer": ("yes", "no")[i % 2],
            "question_id": str(i),
            "category": "adversarial",
        }
        for i in range(6)
    ]


def _mme() -> list[dict[str, Any]]:
    """Two questions about a picture, two pictures of a kind, one of them of cognition."""
    kinds = ("existence", "count", "commonsense_reasoning")
    return [
        {
            "image": _picture(i // 2),
            "question": f"Is number {i} right? Please answer yes or no.",
            "answer": ("Yes", "No")[i % 2],
            "question_id": f"{kind}/{i // 2}",
            "category": kind,
        }
        for kind in kinds
        for i in range(4)
    ]


def _gqa() -> list[dict[str, Any]]:
    """Pictures are in another configuration: :mod:`tests.harness.lmms.local_hub` takes them apart."""
    return [
        {
            "image": _picture(i),
            "imageId": str(i),
            "id": f"{i}",
            "question": examples()[i].questions[0].text,
            "answer": examples()[i].questions[0].answer,
        }
        for i in range(6)
    ]


def _scienceqa() -> list[dict[str, Any]]:
    """Every third without a picture."""
    return [
        {
            "image": None if i % 3 == 2 else _picture(i),
            "hint": "" if i % 2 else "All of it is made up.",
            "question": f"Which is number {i}?",
            "choices": [f"choice {letter}" for letter in _LETTERS[: 2 + i % 3]],
            "answer": i % 2,
        }
        for i in range(6)
    ]


def _textvqa() -> list[dict[str, Any]]:
    return [
        {
            "image": _picture(i),
            "question": f"what is written in picture {i}?",
            "question_id": i,
            "answers": ["word"] * 7 + ["other"] * 3,
            "answer": "word",
            "ocr_tokens": ["WORD", f"n{i}"],
        }
        for i in range(6)
    ]


def _vqav2() -> list[dict[str, Any]]:
    return [
        {**row, "answers": [{"answer": said, "answer_id": n} for n, said in enumerate(row["answers"])]}
        for row in _textvqa()
    ]


def _seedbench() -> list[dict[str, Any]]:
    """The last two of three frames."""
    return [
        {
            "image": [_picture(i + n) for n in range(1 if i < 4 else 3)],
            "data_type": "image" if i < 4 else "video",
            "question": f"What is number {i}?",
            **{f"choice_{letter.lower()}": f"choice {letter}" for letter in _LETTERS},
            "answer": _LETTERS[i % 4],
            "question_id": str(i),
        }
        for i in range(6)
    ]


def _mmmu() -> list[dict[str, Any]]:
    """Every other with two pictures; the last is open."""
    return [
        {
            "id": f"validation_Art_{i}",
            "question": "What is <image 1>?" if i % 2 else "Does <image 1> look like <image 2>?",
            "question_type": "open" if i == 5 else "multiple-choice",
            "options": "[]" if i == 5 else "['yes', 'no', 'hardly']",
            "answer": "a circle" if i == 5 else _LETTERS[i % 3],
            **{f"image_{n}": _picture(n + i) if n <= 2 - i % 2 else None for n in range(1, 8)},
        }
        for i in range(6)
    ]


def _mmbench() -> list[dict[str, Any]]:
    """Three questions, one of them asked again with its options in another order."""
    return [
        {
            "image": _picture(i),
            "index": i % 3 + 1000000 * (i // 3),
            "question": f"What is number {i % 3}?",
            "hint": "nan",
            **{letter: f"choice {letter}" for letter in _LETTERS},
            "answer": _LETTERS[i % 4],
            "category": "object",
            "L2-category": "coarse",
            "source": "here",
            "split": "dev",
        }
        for i in range(4)
    ]
