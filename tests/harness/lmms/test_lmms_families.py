"""Every family, from a folder as the Hub has it: the tokens that transformers generates, in any batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

from tests.vlm.hub_families import FAMILIES, Family
from tests.vlm.hub_folders import write_folder
from tests.vlm.skips import VERSION

pytest.importorskip("lmms_eval", reason="needs lmms-eval: make test-eval")

from lmms_eval.api.instance import Instance

import ocvtp
from tests.harness.lmms.asking import ocvtp_model

TORCHVISION = importlib.util.find_spec("torchvision") is not None
KEEP = 0.25
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
#: For processors without a chat template.
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
#: Heights and widths of the pictures of each question.
QUESTIONS: dict[str, list[tuple[int, int]]] = {
    "what is this?": [(80, 120)],
    "what is a picture?": [],
    "what is written on the left of it, and in which colour?": [(64, 200)],
    "and here?": [(200, 60)],
    "are these the same?": [(112, 112), (90, 70)],
}
Talk = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A family's folder, and what is asked.

    Attributes:
        folder: of the checkpoint.
        template: file of a chat template, if the processor needs one.
        talks: conversations in transformers' form.
        newlines: whether some of its vision tokens end a row of a picture.
    """

    folder: Path
    template: Path | None
    talks: list[Talk]
    newlines: bool

    def model_args(self, pruner: str) -> str:
        """For the plug-in."""
        given = "" if self.template is None else f",chat_template={self.template}"
        return f"pretrained={self.folder},{pruner}{given}"

    def pictures(self) -> list[int]:
        """In each conversation."""
        return [sum(part["type"] == "image" for part in talk[0]["content"]) for talk in self.talks]


def talk(text: str, sizes: Sequence[tuple[int, int]]) -> Talk:
    """A question about pictures of noise."""
    pictures = [
        Image.fromarray(np.random.default_rng(size).integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in sizes
    ]
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def needs_torchvision(family: Family) -> bool:
    """As the processors of its version of transformers do."""
    return family.video or Version(family.pillow) > VERSION


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name = request.param
    family = FAMILIES[name]
    if Version(family.since) > VERSION:
        pytest.skip(f"needs transformers >= {family.since}")
    if not TORCHVISION and needs_torchvision(family):
        pytest.skip("its processor needs torchvision")
    root = tmp_path_factory.mktemp("hub")
    folder = write_folder(root, name)
    asked, template = QUESTIONS, None
    if not family.chat:  # PaliGemma's; and its processor takes one picture, and no question without
        asked = {text: sizes for text, sizes in QUESTIONS.items() if len(sizes) == 1}
        template = root / "template.jinja"
        template.write_text(TEMPLATE, encoding="utf-8")
    talks = [talk(text, sizes) for text, sizes in asked.items()]
    return Case(folder, template, talks, newlines="image_grid_pinpoints" in family.config)


@pytest.fixture(autouse=True)
def tokens_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are numbers of tokens: what random models say is hardly text, and many bytes look alike."""

    def numbers(_: Any, sequences: Any, **__: Any) -> list[str]:
        return [" ".join(str(token) for token in row.tolist()) for row in sequences]

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "batch_decode", numbers)


def requests(lm: Any, talks: list[Talk]) -> list[Instance]:
    """As lmms-eval asks a chat model."""
    lm.task_dict["talks"] = {"test": talks}
    return [
        Instance(
            request_type="generate_until",
            arguments=(f"question {number}", in_their_form, dict(GREEDY), number, "talks", "test"),
            idx=0,
            metadata={"task": "talks", "doc_id": number, "repeats": 1},
        )
        for number in range(len(talks))
    ]


def in_their_form(said: Talk) -> Talk:
    """As tasks give messages to models."""
    return [{**message, "content": [_part(part) for part in message["content"]]} for message in said]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image", "url": part["image"]} if part["type"] == "image" else part


def answers(case: Case, pruner: str, batch_size: int) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Tokens without padding, and counts, of the plug-in."""
    lm = ocvtp_model(case.model_args(pruner), batch_size)
    found = lm.generate_until(requests(lm, case.talks))
    pad = transformers.AutoTokenizer.from_pretrained(case.folder).pad_token_id
    tokens = [[int(token) for token in each.text.split()] for each in found]
    counts = [each.token_counts.to_dict() for each in found]
    return [[token for token in row if token != pad] for row in tokens], counts


@torch.no_grad()
def by_transformers(case: Case, **pruned: Any) -> tuple[list[list[int]], list[int]]:
    """Tokens that ``generate`` adds to each prompt alone, and how many of it the language model reads."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(case.folder, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(case.folder)
    if case.template is not None:
        processor.chat_template = TEMPLATE
    if pruned:
        ocvtp.apply(model, **pruned)
    pad = processor.tokenizer.pad_token_id
    tokens, read = [], []
    for each in case.talks:
        inputs = processor.apply_chat_template(
            each, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        inputs = {key: value for key, value in inputs.items() if key != "labels"}  # PaliGemma's adds them
        read.append(model(**inputs).logits.shape[1])
        new = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
        tokens.append([token for token in new.tolist() if token != pad])
    return tokens, read


def test_unpruned_it_is_transformers(case: Case) -> None:
    want, read = by_transformers(case)
    assert len({tuple(row) for row in want}) > 2  # a model that says one thing would prove nothing
    for batch_size in (1, 3):
        got, counts = answers(case, "pruner=none", batch_size)
        assert got == want
        assert [each["input_tokens"] for each in counts] == read
        assert [each["output_tokens"] for each in counts] == [len(row) for row in want]
        assert [each["images"] for each in counts] == case.pictures()
        assert [each["kept_vision_tokens"] for each in counts] == [each["vision_tokens"] for each in counts]


def test_pruned_it_is_the_patch(case: Case) -> None:
    long = by_transformers(case)[1]
    want, read = by_transformers(case, keep=KEEP)
    for batch_size in (1, 3):
        got, counts = answers(case, f"keep={KEEP}", batch_size)
        assert got == want
        for each, before, after, pictures in zip(counts, long, read, case.pictures(), strict=True):
            assert each["input_tokens"] == after
            assert each["vision_tokens"] - each["kept_vision_tokens"] == before - after
            share = KEEP * each["vision_tokens"]
            if case.newlines:  # not chosen among; one of each picture stays
                assert 0.8 * share <= each["kept_vision_tokens"] <= share + pictures
            else:
                assert abs(each["kept_vision_tokens"] - share) <= pictures / 2
            assert (each["vision_tokens"] > 0) == (pictures > 0)
