"""The demo's questions and answers: a small model that was really trained, before and after pruning.

The model, its pruner and the scenes lie in the repository's ``assets/``: generated pictures of coloured
shapes are all it has seen, and some hundred words all it knows.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ocvtp.commands.dropped import STOOD_FOR, THROWN_AWAY
from ocvtp.commands.errors import UserError
from ocvtp.commands.loading import load_image, load_processor, load_pruner, load_weights
from ocvtp.commands.output import check_writable
from ocvtp.commands.progress import busy, steps
from ocvtp.commands.prune import chat_prompt
from ocvtp.commands.timing import seconds

if TYPE_CHECKING:
    from PIL.Image import Image

    from ocvtp import OCPruner

_OVERLAY = "answers.png"
_TIMED = 7  # of each kind, in turns


def find_assets() -> Path | None:
    """The repository's ``assets/``, if this is an installation from one (``pip install -e``)."""
    folder = Path(__file__).parents[2] / "assets"
    return folder if (folder / "testbed" / "config.json").exists() else None


@dataclass(frozen=True)
class Asked:
    """A question about a picture.

    Attributes:
        picture: number of it.
        question: in words.
        expected: the right answer, if anybody knows it.
        before: the model's answer with all tokens.
        after: with the kept ones, the others thrown away.
        standing: with the kept ones, which stand for the others.
    """

    picture: int
    question: str
    expected: str | None
    before: str
    after: str
    standing: str


@dataclass(frozen=True)
class Answers:
    """What the demo's first part found.

    Attributes:
        asked: every question.
        tokens: of a picture.
        keep: of them, kept.
        before: seconds to the first word with all tokens, run by run.
        after: with the kept ones, the others thrown away.
        standing: with the kept ones, which stand for the others.
    """

    asked: list[Asked]
    tokens: int
    keep: int
    before: list[float]
    after: list[float]
    standing: list[float]


def run(
    assets: Path,
    *,
    out: Path,
    share: float,
    image: Path | None,
    question: str | None,
    console: Console,
) -> Answers:
    """Ask, print, draw ``answers.png`` into the folder ``out``.

    Args:
        assets: with ``testbed``, ``testbed-pruner`` and ``scenes``.
        out: an existing folder.
        share: of the tokens, kept.
        image: the user's; default: the scenes that come with the model.
        question: the user's; default: those that come with the scenes.
        console: to print on.

    Raises:
        UserError: an image that can't be read, an image without a question, or words that the model does
            not know.
    """
    import torch

    import ocvtp

    if image is not None and question is None:
        raise UserError('--image needs --question, say --question "what color is the circle?"')
    path = out / _OVERLAY
    check_writable(path)
    pictures, asked = _questions(assets, image, question)
    source = str(assets / "testbed")
    processor = load_processor(source)
    asked = [(number, _known(processor, words), answer) for number, words, answer in asked]
    model = load_weights(source, torch.device("cpu"), torch.float32, console)
    pruner = load_pruner(str(assets / "testbed-pruner"))
    tokens = int(model.config.image_seq_length)
    keep = max(1, round(share * tokens))
    found = []
    with steps(console, "asking", len(asked)) as step:
        for number, words, answer in asked:
            step(words)
            inputs = _inputs(processor, pictures[number], words)
            said = [_say(model, processor, inputs)]
            for how in (THROWN_AWAY, STOOD_FOR):
                with ocvtp.pruned(model, pruner, keep=keep, **how):
                    said.append(_say(model, processor, inputs))
            found.append(Asked(number, words, answer, *said))
    first = _inputs(processor, pictures[0], asked[0][1])
    answers = Answers(found, tokens, keep, *_time(model, pruner, first, keep))
    _show(answers, image is not None, console)
    with busy(console, "drawing"):
        _draw(model, pruner, processor, pictures[0], keep, path)
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return answers


def _questions(
    assets: Path, image: Path | None, question: str | None
) -> tuple[list[Image], list[tuple[int, str, str | None]]]:
    """Pictures, and questions as number of the picture, words and right answer."""
    if image is not None:
        assert question is not None
        return [load_image(image)], [(0, question, None)]
    scenes = assets / "scenes"
    listed = json.loads((scenes / "questions.json").read_text(encoding="utf-8"))
    pictures = [load_image(scenes / scene["picture"]) for scene in listed]
    if question is not None:
        return pictures[:1], [(0, question, None)]
    asked = [(i, each["question"], each["answer"]) for i, s in enumerate(listed) for each in s["questions"]]
    return pictures, asked


def _known(processor: Any, question: str) -> str:
    """The question in words that the model knows.

    Raises:
        UserError: it does not know some.
    """
    tokenizer = processor.tokenizer
    known = {word.lower(): word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens}
    known["a"] = "a"  # the article, not the letter
    words = question.strip().rstrip("?").lower().split()
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        listed = sorted(word for word in known.values() if word.replace("-", "").isalnum())
        raise UserError(
            f"the demo's model does not know {', '.join(map(repr, unknown)) or 'an empty question'}; "
            f"its words are: {' '.join(listed)}"
        )
    return " ".join(known[word] for word in words) + "?"


def _inputs(processor: Any, picture: Image, question: str) -> dict[str, Any]:
    text = chat_prompt(processor, question)
    made: dict[str, Any] = processor(images=picture, text=text, return_tensors="pt")
    return made


def _say(model: Any, processor: Any, inputs: dict[str, Any]) -> str:
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    said: str = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said.strip()


def _time(
    model: Any, pruner: OCPruner, inputs: dict[str, Any], keep: int
) -> tuple[list[float], list[float], list[float]]:
    """Seconds to the first word, unpruned and pruned in both ways, in turns."""
    import ocvtp

    def first_word() -> None:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)

    before: list[float] = []
    after: list[float] = []
    standing: list[float] = []
    for _ in range(_TIMED):
        before.append(seconds(first_word))
        for how, found in ((THROWN_AWAY, after), (STOOD_FOR, standing)):
            with ocvtp.pruned(model, pruner, keep=keep, **how):
                found.append(seconds(first_word))
    return before, after, standing


def _show(answers: Answers, own: bool, console: Console) -> None:
    ways = {
        "before": f"all {answers.tokens} tokens",
        "after": f"{answers.keep} tokens",
        "standing": f"{answers.keep} that stand for all",
    }
    console.print(
        "[bold]A small model that was trained[/] on generated scenes "
        "(assets/README.md); its answers mean something:"
    )
    truthful = not own and answers.asked[0].expected is not None
    table = Table("question", *(("truth",) if truthful else ()), *ways.values())
    for one in answers.asked:
        if one.picture == 0:
            truth = () if one.expected is None or own else (one.expected,)
            table.add_row(one.question, *truth, *(_marked(getattr(one, way), one) for way in ways))
    console.print(table)
    console.print(
        "To stand for all: each dropped token is averaged into the nearest kept one, and the language model "
        "knows how many it stands for."
    )
    judged = [one for one in answers.asked if one.expected is not None]
    if judged:
        right = {way: sum(getattr(one, way) == one.expected for one in judged) for way in ways}
        told = ", ".join(f"{right[way]} right with {words}" for way, words in ways.items())
        console.print(
            f"of {len(judged)} questions about {1 + max(one.picture for one in judged)} scenes, {told} "
            "(so few say little; docs/accuracy.md has thousands)"
        )
    if own:
        console.print("It has seen nothing but coloured shapes: of photographs it knows no better.")
    times = {way: 1e3 * statistics.median(getattr(answers, way)) for way in ways}
    told = ", ".join(f"{times[way]:.0f} ms with {words}" for way, words in ways.items())
    console.print(f"first word after {told}: a model this small has little to save")


def _marked(said: str, one: Asked) -> str:
    return said if one.expected in (None, said) else f"[red]{said}[/]"


def _draw(model: Any, pruner: OCPruner, processor: Any, picture: Image, keep: int, path: Path) -> None:
    import ocvtp
    from ocvtp.commands.visualize import draw

    images = processor.image_processor
    pixels = images(images=picture, return_tensors="pt")["pixel_values"]
    with ocvtp.pruned(model, pruner, keep=keep, **STOOD_FOR):
        draw(model, pixels, images).save(path)
