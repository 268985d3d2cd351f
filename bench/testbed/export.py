"""From a training run to what is shipped: float16 weights, processor, scenes for the demo, checksums."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bench.testbed.examples import Split, example
from bench.testbed.language import build_processor
from bench.testbed.recipe import Recipe
from bench.testbed.train import CHECKPOINT, LOG, RUN, Run
from ocvtp.atomic import write_atomic, write_json

ASSETS = Path(__file__).parents[2] / "assets"
SUMS = "SHA256SUMS"
_DEMO_SCENES = 6
_DEMO_QUESTIONS = 8
_DEMO_FIRST = 1_000_000  # of the test split, beyond what any benchmark asks about


def export(run: Path, out: Path) -> None:
    """Write the model of a finished run as a folder that ``from_pretrained`` takes.

    Raises:
        ValueError: no run there, or it has not come to its end.
    """
    if not (run / CHECKPOINT).exists():
        raise ValueError(f"{run} holds no training run")
    about = json.loads((run / RUN).read_text())
    recipe = Recipe.from_dict(about["recipe"])
    finished = Run(recipe, run, torch.device("cpu"))
    if not finished.done:
        raise ValueError(f"the run in {run} is not done: start it again to go on")
    out.mkdir(parents=True, exist_ok=True)
    model = finished.model.half()
    model.generation_config.max_new_tokens = 4
    model.save_pretrained(out)
    _spell_as_published(out / "model.safetensors")
    build_processor(recipe.size.side, recipe.size.patch).save_pretrained(out)
    validations = [line for line in _lines(run / LOG) if "validation" in line]
    about["validation"] = validations[-1]["validation"] if validations else None
    about["seconds"] = finished.seconds
    write_json(out / "training.json", about)


def _spell_as_published(weights: Path) -> None:
    """Name the tower's weights as LLaVA's checkpoints on the Hub do: old transformers load no others."""
    state = {
        re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", key): value
        for key, value in load_file(weights).items()
    }
    write_atomic(weights, lambda partial: save_file(state, partial, metadata={"format": "pt"}))


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def pictures(split: Split, count: int, out: Path) -> None:
    """The first pictures of a split as PNG files, say to train a pruner on. Those there are painted anew."""
    out.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        file = out / f"{index:06d}.png"
        picture = Image.fromarray(example(split, index, 0).pixels)
        write_atomic(file, functools.partial(picture.save, format="PNG"))


def scenes(out: Path) -> None:
    """Pictures and questions with answers for the demo, from the test split."""
    out.mkdir(parents=True, exist_ok=True)
    listed = []
    for index in range(_DEMO_FIRST, _DEMO_FIRST + _DEMO_SCENES):
        one = example("test", index, _DEMO_QUESTIONS)
        name = f"scene-{index - _DEMO_FIRST}.png"
        Image.fromarray(one.pixels).save(out / name, optimize=True)
        asked = [{"question": q.text, "answer": q.answer, "kind": q.kind} for q in one.questions]
        listed.append({"picture": name, "questions": asked})
    write_json(out / "questions.json", listed)


def copy_pruner(run: Path, out: Path) -> None:
    """The pruner of an ``ocvtp train`` run, without its decoder, which choosing does not need."""
    from ocvtp import OCPruner, PrunerConfig

    trained = OCPruner.from_pretrained(str(run / "pruner"))
    config = {**trained.config.to_dict(), "decoder_layers": 0}
    slim = OCPruner(PrunerConfig.from_dict(config))
    state = {k: v for k, v in trained.state_dict().items() if not k.startswith("decoder.")}
    slim.load_state_dict(state)
    slim.half().save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)  # the Hub's template of a card; ours is in the folder above
    notes = run / "pruner" / "training.json"
    if notes.exists():
        shutil.copy(notes, out / notes.name)


def write_sums(assets: Path) -> None:
    """SHA-256 of every file of the folder, as ``sha256sum -c`` reads them."""
    files = sorted(path for path in assets.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(assets).as_posix()}\n"
        for path in files
    ]
    (assets / SUMS).write_text("".join(lines))
