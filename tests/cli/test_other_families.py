"""``ocvtp prune`` on models other than LLaVA-1.5, with rules and shares."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.version import Version

from ocvtp.vlm.contracts.selector import DEFAULT_RULE
from tests.cli.conftest import Files
from tests.cli.test_commands import ASK, json_in, run
from tests.vlm.hub_families import FAMILIES
from tests.vlm.hub_folders import write_folder
from tests.vlm.skips import VERSION

NAMES = ["llava-hf/llava-v1.6-vicuna-7b-hf", "google/gemma-3-4b-it", "HuggingFaceM4/Idefics3-8B-Llama3"]


@pytest.mark.parametrize("name", NAMES)
def test_a_photograph(name: str, files: Files, tmp_path: Path) -> None:
    family = FAMILIES[name]
    if Version(max(family.since, family.pillow, key=Version)) > VERSION:
        pytest.skip(f"needs transformers >= {max(family.since, family.pillow, key=Version)}")
    folder = write_folder(tmp_path, name)
    told = {}
    for keep in ("1.0", "0.5", "1"):
        arguments = ["prune", files.image, "--model", folder, "--pruner", "attention", "--keep", keep]
        told[keep] = json_in(run(*arguments, "--max-new-tokens", "3", "--json", "--dtype", "float32"))
        assert "attention" in told[keep]["report"]
    before = told["1.0"]["image_tokens_before"]
    after = [told[keep]["image_tokens_after"] for keep in ("1.0", "0.5", "1")]
    assert after[0] == before
    assert after[0] > after[1] > after[2] > 0
    for result in told.values():
        dropped = result["image_tokens_before"] - result["image_tokens_after"]
        assert result["prompt_tokens_before"] - result["prompt_tokens_after"] == dropped


def test_rules_and_shares_on_a_llava(files: Files) -> None:
    arguments = [*files.arguments]
    arguments[4] = "grid"
    result = json_in(run("prune", *arguments, *ASK, "--json"))
    assert result["image_tokens_after"] == 5
    arguments += ["--prompt", "w5", "--max-new-tokens", "2"]
    assert json_in(run("prune", *arguments, "--keep", "0.25", "--json"))["image_tokens_after"] == 4
    farthest = [*arguments[:4], "farthest_point", *arguments[5:], "--refine", "1", "--keep", "4", "--json"]
    told = json_in(run("prune", *farthest))
    assert told["image_tokens_after"] == 4
    assert "1 round of refinement" in told["report"]
    unsaid = [*arguments[:3], *arguments[5:], "--keep", "4", "--json"]
    assert "--pruner" not in unsaid
    assert DEFAULT_RULE in json_in(run("prune", *unsaid))["report"]
    for wrong in ("1.5", "0.0", "-0.5"):
        assert "--keep" in run("prune", *arguments, f"--keep={wrong}", code=2)
    assert "many" in run("prune", *arguments, "--keep", "many", code=2)
