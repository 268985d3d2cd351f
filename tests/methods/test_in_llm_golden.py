"""Choices inside a language model against those of the official code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ocvtp.methods import in_llm

DATA = Path(__file__).parents[1] / "data" / "rivals_llm"


def read(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return json.loads(file.metadata()["case"]), tensors


def indices(mask: torch.Tensor) -> torch.Tensor:
    return mask.nonzero()[:, 0]


@pytest.mark.parametrize("name", ["fastv_a", "sparsevlm1_b", "sparsevlm2_b", "pdrop_b"])
def test_scores_become_the_official_choice(name: str) -> None:
    _, tensors = read(name)
    cuts = [key for key in tensors if ".scores" in key]
    assert cuts
    for key in cuts:
        scores, kept = tensors[key], tensors[key.replace("scores", "kept")]
        assert torch.equal(indices(in_llm.highest(scores[None], [len(kept)])[0]), kept)


def test_rows_of_different_lengths_choose_as_alone() -> None:
    _, tensors = read("pdrop_b")
    rows = [tensors["stage0.scores.row0"], tensors["stage0.scores.row2"]]
    kept = [tensors["stage0.kept.row0"], tensors["stage0.kept.row2"]]
    padded = torch.full((3, 48), float("-inf"))
    padded[0, :48], padded[2, :40] = rows[0], rows[1]
    found = in_llm.highest(padded, [len(kept[0]), 0, len(kept[1])])
    assert torch.equal(indices(found[0]), kept[0])
    assert not found[1].any()
    assert torch.equal(indices(found[2]), kept[1])


@pytest.mark.parametrize("name", ["fastv_a", "sparsevlm1_b", "sparsevlm2_b", "pdrop_b", "dart_b"])
def test_counts_are_the_official_ones(name: str) -> None:
    case, _ = read(name)
    for (_, tokens), account in zip(
        (span for span in case["image_spans"] if span[1]), case["accounting"], strict=True
    ):
        found = in_llm.averages(method_of(case), depth=case["layers"], tokens=tokens)
        assert list(found.layers) == account["tokens_into_layer"]
        assert found.entering == pytest.approx(account["input_average"], abs=1e-4)
        assert found.leaving == pytest.approx(account["output_average"], abs=1e-4)
        assert list(found.nominal) == account["nominal"]


def method_of(case: dict[str, Any]) -> in_llm.Method:
    given, tokens = case["parameters"], case["image_spans"][0][1]
    if case["method"] == "fastv":
        return in_llm.FastV(given["K"], given["keep"])
    if case["method"] == "pdrop":
        return in_llm.PyramidDrop(tuple(given["layer_list"]), tuple(given["ratios"]))
    if case["method"] == "dart":
        each = int(tokens * (1 - given["r"])) // sum(given["pivots"])
        return in_llm.Dart(given["K"], 4 + 8 * each)
    return in_llm.SparseVLM(tuple(given["prune_after_layers"]), tuple(given["lists"]), given["version"])


def test_sparsevlm_makes_the_official_tokens_of_the_official_pool() -> None:
    _, tensors = read("sparsevlm1_b")
    for cut in range(3):
        pool, merged = tensors[f"stage{cut}.pool"], tensors[f"stage{cut}.merged"]
        _, means = in_llm.density_peaks(pool[None], len(merged))
        assert torch.allclose(means[0], merged, atol=1e-5)


def test_sparsevlm_pools_as_many_as_the_official_code() -> None:
    case, tensors = read("sparsevlm1_b")
    method = method_of(case)
    present = 90
    for cut in range(3):
        kept, made = method.left(cut, present, 90)
        assert (kept, made) == (len(tensors[f"stage{cut}.kept"]), len(tensors[f"stage{cut}.merged"]))
        scores = tensors[f"stage{cut}.scores"][None]
        pool = in_llm.recycled(scores, in_llm.highest(scores, [kept]), len(tensors[f"stage{cut}.pool"]))
        assert len(set(pool[0].tolist()) & set(tensors[f"stage{cut}.kept"].tolist())) == 0
        assert (scores[0, pool[0]].diff() <= 0).all()
        present = kept + made


def test_raters_are_the_official_ones() -> None:
    for name in ("sparsevlm1_b", "sparsevlm2_b"):
        case, tensors = read(name)
        start, count = case["image_spans"][0]
        embeddings = tensors["inputs_embeds"]
        vision, text = embeddings[:, start : start + count], embeddings[:, start + count :]
        every = [torch.ones(one.shape[:2], dtype=torch.bool) for one in (vision, text)]
        assert torch.equal(
            indices(in_llm.text_raters(vision, every[0], text, every[1])[0]), tensors["raters"]
        )


def test_darts_pivots_are_the_official_ones() -> None:
    """The walk needs states that are not recorded; the test of whole models has it."""
    _, tensors = read("dart_b")
    pivots = in_llm.longest(tensors["fixed.stage0.scores"][None], [4])[0] + 6
    assert pivots.tolist() == tensors["fixed.stage0.pivots"][:4].tolist()
    text = in_llm.longest(tensors["stage0.text_norms"][None], [4])[0] + 78
    assert text.tolist() == tensors["fixed.stage0.pivots"][4:].tolist()
    assert list({*pivots.tolist(), *text.tolist()}) == tensors["stage0.pivots"].tolist()
