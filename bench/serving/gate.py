"""What must hold before a server is timed.

In float32 its greedy answers are those of transformers with ``ocvtp.apply``, token for token. In half
precision, where sums ordered otherwise give other tokens, every answer comes out the same when the picture is
sent again under another name, so that nothing of it is in a cache. Always: the server counts as many tokens
in each prompt as pruning leaves, and answers tell pruned servers from the unpruned one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import ocvtp
from bench.micro.gates import GateError
from bench.serving.contenders import Contender
from bench.serving.folders import Folders
from bench.serving.pictures import body, message, picture
from bench.serving.presets import Preset
from ocvtp import OCPruner

#: Pictures that are asked about, and where their numbers begin.
_PICTURES, _FIRST = 3, 900_000

Answers = list[tuple[int, ...]]


@dataclass(frozen=True)
class Answered:
    """Of one server: tokens and numbers of prompt tokens, each picture's twice in a row."""

    tokens: Answers
    prompts: list[int]


@dataclass(frozen=True)
class Questions:
    """What is asked, and what must come.

    Attributes:
        bodies: requests, each picture twice in a row, the second time under another name.
        prompt_tokens: of an unpruned prompt.
        answers: contender -> tokens that transformers answers, in float32; empty in half precision.
    """

    bodies: list[bytes]
    prompt_tokens: int
    answers: Mapping[str, Answers]


def questions(preset: Preset, folders: Folders, those: Sequence[Contender]) -> Questions:
    """Make requests, and have transformers answer them in float32.

    Args:
        preset: what is measured.
        folders: of the model and the pruner.
        those: servers that will be asked.
    """
    from transformers import AutoProcessor

    pictures = [picture(_FIRST + number, folders.side) for number in range(_PICTURES)]
    bodies = [
        body(one, preset.question, preset.answer, mark)
        for number, one in enumerate(pictures)
        for mark in (None, f"again-{number}")
    ]
    processor = AutoProcessor.from_pretrained(folders.model)
    text = processor.apply_chat_template(message(preset.question), add_generation_prompt=True)
    inputs = [
        processor(images=[one], text=text, return_tensors="pt", add_special_tokens=False) for one in pictures
    ]
    answers = _transformers(preset, folders, inputs, those) if preset.dtype == "float32" else {}
    return Questions(bodies, inputs[0]["input_ids"].shape[1], answers)


def _transformers(
    preset: Preset, folders: Folders, inputs: Sequence[Any], those: Sequence[Contender]
) -> dict[str, Answers]:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folders.model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def answer(one: Any) -> tuple[int, ...]:
        made = model.generate(**one, max_new_tokens=preset.answer, do_sample=False)
        return tuple(made[0, one["input_ids"].shape[1] :].tolist())

    found = {}
    for contender in those:
        if contender.settings is None:
            found[contender.name] = [answer(one) for one in inputs]
            continue
        chooser = {}
        if "pruner" in contender.settings:
            chooser = {"pruner": OCPruner.from_pretrained(contender.settings["pruner"])}
        with ocvtp.pruned(model, keep=contender.keep, weigh=False, **chooser):
            found[contender.name] = [answer(one) for one in inputs]
    return found


def check(
    asked: Questions,
    those: Sequence[Contender],
    image_tokens: int,
    ask: Callable[[Contender, list[bytes]], Answered],
) -> list[str]:
    """Ask all servers, one request after the other; what was found, in words.

    Args:
        asked: requests and what must come.
        those: servers.
        image_tokens: of a picture, unpruned.
        ask: has a server answer requests.

    Raises:
        GateError: a server answers something else than it should.
    """
    came = {contender.name: ask(contender, asked.bodies) for contender in those}
    for contender in those:
        left = asked.prompt_tokens - (0 if contender.keep is None else image_tokens - contender.keep)
        _count(contender.name, came[contender.name].prompts, left)
        _again(contender.name, came[contender.name].tokens)
        if asked.answers:
            _same(contender.name, came[contender.name].tokens[::2], asked.answers[contender.name])
    whole = [came[contender.name].tokens for contender in those if contender.keep is None]
    for contender in those:
        if contender.keep is not None and came[contender.name].tokens in whole:
            raise GateError(f"{contender.name}: all answers are the unpruned model's: they tell nothing")
    names = ", ".join(contender.name for contender in those)
    found = [f"{names}: prompts have as many tokens as pruning leaves, by the server's own count"]
    found.append(f"{names}: answers are the same when a picture is sent again under another name")
    if asked.answers:
        found.append(f"{names}: all greedy tokens are those of ocvtp.apply in transformers")
    return found


def _count(name: str, got: Sequence[int], want: int) -> None:
    if set(got) != {want}:
        raise GateError(f"{name}: the server counts {sorted(set(got))} tokens in prompts of {want}")


def _again(name: str, tokens: Answers) -> None:
    if tokens[::2] != tokens[1::2]:
        raise GateError(f"{name}: answers differ when a picture is sent again: {tokens}")


def _same(name: str, got: Answers, want: Answers) -> None:
    if got != want:
        raise GateError(f"{name}: the server answers {got}, transformers {want}")
