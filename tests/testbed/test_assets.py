"""What is shipped: small, whole, loadable, and of a known commit."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ocvtp import OCPruner

ASSETS = Path(__file__).parents[2] / "assets"
#: Layers that they read: the published one's share of the way up, and the one that the projector reads.
PRUNERS = {
    "testbed-pruner": 2,
    "testbed-pruner-1": 2,
    "testbed-pruner-consumed": 5,
    "testbed-pruner-consumed-1": 5,
}


def test_every_file_has_its_checksum() -> None:
    lines = (ASSETS / "SHA256SUMS").read_text().splitlines()
    listed = dict(reversed(line.split("  ")) for line in lines)
    files = {path.relative_to(ASSETS).as_posix() for path in ASSETS.rglob("*") if path.is_file()}
    assert set(listed) == files - {"SHA256SUMS"}
    for name, digest in listed.items():
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest, name


def test_weights_are_small_and_in_half_precision() -> None:
    weights = sorted(ASSETS.rglob("*.safetensors"))
    assert len(weights) == 1 + len(PRUNERS)
    pruners = [path for path in weights if path.parent.name in PRUNERS]
    assert sum(path.stat().st_size for path in pruners) < 4e6
    assert sum(path.stat().st_size for path in weights) < 14e6
    for path in weights:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                assert file.get_tensor(key).dtype == torch.float16
    assert not [p for p in ASSETS.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_tower_is_spelt_as_on_the_hub() -> None:
    """Old transformers, 5.0 among them, load no other spelling: the tower stays random, with a warning."""
    with safe_open(ASSETS / "testbed" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert "language_model.model.embed_tokens.weight" in names


def test_the_model_comes_from_a_clean_commit() -> None:
    about = json.loads((ASSETS / "testbed" / "training.json").read_text())
    for start in about["starts"]:
        assert re.fullmatch(r"(.*-g)?[0-9a-f]{7,}", start["commit"]), start["commit"]
    assert about["recipe"]["seed"] == 0
    recipe = json.loads((ASSETS.parent / "bench" / "testbed" / "recipe.json").read_text())
    assert about["recipe"]["stages"] == [
        {"warmup": 100, "crowded": False, "things": [3, 8], "tower": 1.0, **s} for s in recipe["stages"]
    ]


@pytest.mark.parametrize("name", PRUNERS)
def test_pruners_belong_to_the_model(name: str) -> None:
    from transformers import LlavaForConditionalGeneration

    from ocvtp import vlm

    model = LlavaForConditionalGeneration.from_pretrained(ASSETS / "testbed", dtype=torch.float32)
    pruner = OCPruner.from_pretrained(str(ASSETS / name))
    report = vlm.apply(model, pruner, keep=28)
    assert (report.tokens_before, report.tokens_after, report.read_layer) == (256, 28, PRUNERS[name])
    about = json.loads((ASSETS / name / "training.json").read_text())
    assert about


def test_all_pruners_differ() -> None:
    means = [OCPruner.from_pretrained(str(ASSETS / name)).slot_mean for name in PRUNERS]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(means, 2))
