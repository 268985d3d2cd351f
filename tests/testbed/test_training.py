"""Training resumes to the bit, and what it makes can be shipped and loaded like any checkpoint."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bench.testbed import __main__ as command
from bench.testbed import export
from bench.testbed.examples import example
from bench.testbed.recipe import Recipe, Stage
from bench.testbed.train import CHECKPOINT, LOG, RUN, Run

CPU = torch.device("cpu")
TINY = {
    "seed": 3,
    "size": {"width": 32, "layers": 2, "heads": 2, "text_width": 32, "text_layers": 1, "text_heads": 2},
    "stages": [
        {
            "name": "tower",
            "steps": 3,
            "batch": 2,
            "questions": 0,
            "dense": 1.0,
            "learning_rate": 1e-3,
            "muon": 0.01,
        },
        {
            "name": "joint",
            "steps": 4,
            "batch": 2,
            "questions": 3,
            "dense": 0.3,
            "learning_rate": 1e-3,
            "muon": 0.01,
        },
    ],
    "validate_every": 2,
    "validation": 20,
}


def recipe(**changes: object) -> Recipe:
    return Recipe.from_dict({**TINY, **changes})


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.model.state_dict()


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path: Path, stop_after: int) -> None:
    straight = Run(recipe(), tmp_path / "straight", CPU, workers=0)
    assert straight.train()
    broken = Run(recipe(), tmp_path / "broken", CPU, workers=0)
    steps = 0
    while not broken.train(limit=0.0):  # one step, then a checkpoint
        steps += 1
        if steps == stop_after:
            break
    assert not broken.done
    resumed = Run(recipe(), tmp_path / "broken", CPU, workers=0)
    assert resumed.train()
    for name, value in weights(straight).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_a_finished_run_stays_finished_and_other_recipes_are_refused(tmp_path: Path) -> None:
    run = Run(recipe(), tmp_path, CPU, workers=0)
    assert run.train()
    before = (tmp_path / CHECKPOINT).read_bytes()
    again = Run(recipe(), tmp_path, CPU, workers=0)
    assert again.done
    assert again.train()
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    with pytest.raises(ValueError, match="another recipe"):
        Run(recipe(seed=4), tmp_path, CPU)


def test_a_run_that_was_killed_leaves_a_log_that_can_be_read(tmp_path: Path) -> None:
    """A line cut in two, and lines of steps after the last checkpoint, which will be done again."""
    run = Run(recipe(), tmp_path, CPU, workers=0)
    while not run.train(limit=0.0) and run._stage == 0:
        pass
    log = tmp_path / LOG
    log.write_text(log.read_text() + '{"stage": "joint", "step": 2}\n{"stage": "joint", "st')
    Run(recipe(), tmp_path, CPU, workers=0).train()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    order = [(line["stage"] == "joint", line["step"], "validation" in line) for line in lines]
    assert order == sorted(set(order))
    starts = json.loads((tmp_path / RUN).read_text())["starts"]
    assert [start["processes"] for start in starts] == [1, 1]
    first = run._recipe.stages[0].name
    assert [(start["stage"], start["step"]) for start in starts] == [(first, 0), ("joint", 1)]


def test_seconds_count_every_start(tmp_path: Path) -> None:
    spent, done = 0.0, False
    while not done:
        run = Run(recipe(), tmp_path, CPU, workers=0)
        start = time.monotonic()
        done = run.train(limit=0.0)
        spent += time.monotonic() - start
    assert 0.5 * spent < run.seconds <= spent


def test_the_log_has_losses_and_validation_by_kind(tmp_path: Path) -> None:
    Run(recipe(), tmp_path, CPU, workers=0).train()
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert {"dense", "answers", "accuracy"} <= set(lines[-2])
    assert {"all", "color", "count", "reading"} <= set(lines[-1]["validation"])


def test_blind_training_leaves_the_tower_alone(tmp_path: Path) -> None:
    run = Run(recipe(blind=True, stages=TINY["stages"][1:]), tmp_path, CPU, workers=0)
    before = {k: v.clone() for k, v in weights(run).items()}
    assert run.train()
    changed = {name for name, value in weights(run).items() if not torch.equal(before[name], value)}
    assert changed
    decayed = "weight_decay shrinks matrices that get no gradient"
    assert not [n for n in changed if "vision_tower" in n or "projector" in n], decayed


def test_a_frozen_tower_stays_and_a_slow_one_moves_less(tmp_path: Path) -> None:
    moved = {}
    for share in (0.0, 0.1, 1.0):
        stage = {**TINY["stages"][1], "tower": share, "steps": 2}
        run = Run(recipe(stages=[stage]), tmp_path / str(share), CPU, workers=0)
        before = {k: v.clone() for k, v in weights(run).items()}
        assert run.train()
        change = {k: float((v - before[k]).norm()) for k, v in weights(run).items()}
        moved[share] = sum(v for k, v in change.items() if "vision_tower" in k)
        assert sum(v for k, v in change.items() if "language_model" in k) > 0
    assert moved[0.0] == 0
    assert 0 < moved[0.1] < 0.2 * moved[1.0]


def test_recipes() -> None:
    assert Recipe.from_dict(recipe().to_dict()) == recipe()
    with pytest.raises(ValueError, match=r"no field.*stagse"):
        Recipe.from_dict({"stagse": []})
    with pytest.raises(ValueError, match="needs stages"):
        Recipe.from_dict({})
    shipped = Recipe.read(Path(command.__file__).with_name("recipe.json"))
    assert isinstance(shipped.stages[0], Stage)


def test_from_a_run_to_assets(tmp_path: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    run = Run(recipe(), tmp_path / "run", CPU, workers=0)
    assert not run.train(limit=0.0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match="not done"):
        export.export(tmp_path / "run", tmp_path / "early")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before  # it may go on
    run.train()
    assets = tmp_path / "assets"
    command.main(["ship", "--run", str(tmp_path / "run"), "--assets", str(assets)])
    stored = load_file(assets / "testbed" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    model = LlavaForConditionalGeneration.from_pretrained(assets / "testbed", dtype=torch.float32)
    for name, value in weights(run).items():
        torch.testing.assert_close(model.state_dict()[name], value.half().float(), rtol=0, atol=0)
    processor = AutoProcessor.from_pretrained(assets / "testbed")
    scene = json.loads((assets / "scenes" / "questions.json").read_text())[0]
    picture = Image.open(assets / "scenes" / scene["picture"])
    text = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": scene["questions"][0]["question"]}],
            }
        ],
        add_generation_prompt=True,
    )
    inputs = processor(images=picture, text=text, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 256
    assert model.generate(**inputs, do_sample=False, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    for line in (assets / export.SUMS).read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((assets / name).read_bytes()).hexdigest() == digest


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training run"):
        export.export(tmp_path, tmp_path / "out")


def test_pictures_for_the_pruner_are_the_splits(tmp_path: Path) -> None:
    command.main(["pictures", "--out", str(tmp_path), "--count", "3", "--split", "validation"])
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    for index, file in enumerate(files):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), example("validation", index, 0).pixels)
