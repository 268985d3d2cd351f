"""Everybody who prunes is an argument: the tokens that the patch makes the model generate, in a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoTokenizer

from tests.vlm.hub_folders import write_folder

pytest.importorskip("lmms_eval", reason="needs lmms-eval: make test-eval")

from ocvtp.harness.arguments import inside_of, rival_of
from ocvtp.methods.in_llm import Inside
from ocvtp.vlm.contracts.reducer import Rival
from ocvtp.vlm.contracts.selector import Rule
from ocvtp.vlm.rivals import ClipText
from tests.harness.lmms.talks import QUESTIONS, Case, answers, by_transformers, talk

pytestmark = pytest.mark.usefixtures("tokens_are_told")

TOKENS, KEPT = 16, 8  # of a picture
#: They read the question; the small model has no text tower to read it with.
READERS = ("trim", "cdpruner")
#: Inside a language model of two layers, with half of the vision tokens from the second on.
INSIDES: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 1, "keep": 0.5},
    "dart": {"layer": 1, "keep": 0.5},
    "pyramiddrop": {"layers": [1], "ratios": [0.5]},
    "sparsevlm": {"layers": [0], "keep": [0.5], "recycle": 0},
    "sparsevlm2": {"layers": [0], "keep": [0.5], "heads": 2},
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = write_folder(tmp_path_factory.mktemp("hub"), "llava-hf/llava-1.5-7b-hf")
    return Case(folder, None, [talk(text, sizes) for text, sizes in QUESTIONS.items()])


@pytest.mark.parametrize("name", [*get_args(Rule), *get_args(Rival)])
def test_before_the_language_model(case: Case, name: str) -> None:
    settings = {"text": "language_model"} if name in READERS else None
    pruner = name if settings is None else rival_of(name, settings, None)
    want, read = by_transformers(case, pruner=pruner, keep=KEPT)
    said = "" if settings is None else f",settings={json.dumps(settings)}"
    check(case, f"pruner={name},keep={KEPT}{said}", want, read, KEPT, KEPT)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a text tower, whose tokens are characters, for the small model's vision tower."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    begin, end = len(words) - 2, len(words) - 1
    sizes = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "hidden_size": 32, "bos_token_id": begin, "eos_token_id": end, **sizes}
    vision = {"hidden_size": 32, "image_size": 56, "patch_size": 14, **sizes}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", READERS)
def test_a_text_encoder_reads_the_questions(case: Case, clip: Path, name: str) -> None:
    decode = AutoTokenizer.from_pretrained(case.folder).decode
    want, read = by_transformers(
        case, pruner=rival_of(name, None, ClipText.load(clip, decode=decode)), keep=KEPT
    )
    own, _ = by_transformers(case, pruner=rival_of(name, {"text": "language_model"}, None), keep=KEPT)
    assert want != own
    check(case, f"pruner={name},keep={KEPT},text_encoder={clip}", want, read, KEPT, KEPT)


@pytest.mark.parametrize("name", get_args(Inside))
@pytest.mark.parametrize("before", [None, "random"])
def test_inside_it(case: Case, name: str, before: str | None) -> None:
    settings = {"name": name, **INSIDES[name]}
    first = {} if before is None else {"keep": KEPT}
    want, _ = by_transformers(case, pruner=before, inside=inside_of(settings), **first)
    said = "pruner=none" if before is None else f"pruner={before},keep={KEPT}"
    kept = TOKENS if before is None else KEPT
    check(case, f"{said},inside={json.dumps(settings)}", want, None, kept, 0.75 * kept)


def check(
    case: Case, arguments: str, want: list[list[int]], read: list[int] | None, kept: int, average: float
) -> None:
    """Tokens, and counts of each picture: before the language model, and in its layers on average."""
    got, counts = answers(case, arguments, 3)
    assert got == want
    if read is not None:
        assert [each["input_tokens"] for each in counts] == read
    pictures = case.pictures()
    assert [each["vision_tokens"] for each in counts] == [TOKENS * n for n in pictures]
    assert [each["kept_vision_tokens"] for each in counts] == [kept * n for n in pictures]
    assert [each["vision_tokens_in_layers"] for each in counts] == [average * n for n in pictures]
