"""Several images or videos of different sizes in one call: what runs once, what is refused, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ocvtp
from ocvtp import PatchError
from tests.vlm.families import merged, qwen, tiled
from tests.vlm.family import Family, Inputs, families
from tests.vlm.skips import needs_mm_route

FAMILY = {family.name: family for family in families()}
MERGERS = {
    "llava_next": "multi_modal_projector",
    "llava_onevision": "multi_modal_projector",
    "qwen2_5_vl": "visual.merger",
}


def four_images(family: Family, model: Any) -> Inputs:
    if family.mrope:
        row = [1, *(token for i in range(4) for token in qwen.image(i))]
        return qwen.with_types(model, row, **qwen.picture(0, 1, 2, 3))
    parts = [part for i in range(4) for part in ([i], 9)]
    return {"input_ids": tiled.ids(model, 1, *parts), **tiled.pictures([0, 1, 2, 3])}


@pytest.mark.parametrize("name", [name for name in MERGERS if name in FAMILY])
@torch.no_grad()
def test_all_tokens_are_projected_at_most_once(name: str) -> None:
    """Images are handled by size; those that keep everything share one run, as they have it unpatched."""
    family = FAMILY[name]
    model = family.model()
    inputs = four_images(family, model)
    rows: list[int] = []
    model.model.get_submodule(MERGERS[name]).register_forward_hook(
        lambda _m, given, _o: rows.append(given[0].shape[:-1].numel())
    )
    model(**inputs)
    everything = sum(rows)
    for keep in (1.0, 11, family.keep):
        ocvtp.apply(model, family.pruner(), keep=keep)
        rows.clear()
        model(**inputs)
        assert rows.count(everything) <= 1
        if keep == 1.0:
            assert rows == [everything]


def test_videos_that_keep_different_numbers_of_tokens() -> None:
    needs_mm_route()
    family = FAMILY["llava_onevision"]
    model, row = family.model(), family.rows()["video"]
    ids = torch.cat([row["input_ids"]] * 2)
    videos = torch.randn(2, 3, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    videos[0] = 0.01
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": videos}
    said = []
    for limit in (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        ocvtp.apply(
            model, family.pruner(), keep="auto", max_error=limit, budgets=[1, 2, 3, 5, 8], frames="all"
        )
        try:
            model(**inputs)
        except ValueError as error:
            said.append(str(error))
    assert said
    assert all("pass one video at a time" in words for words in said)
    ocvtp.apply(model, family.pruner(), keep=5, frames="all")
    assert model(**inputs).logits.shape[1] == ids.shape[1] - 3 * 4 + 5


@pytest.mark.parametrize("make", [tiled.llava_next, merged.internvl])
def test_a_class_token_among_the_features_is_refused_at_once(make: Any) -> None:
    model = make()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="vision_feature_select_strategy"):
        ocvtp.apply(model, "grid", keep=3)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (tiled.llava_next, "pack_image_features"),
        (tiled.llava_onevision, "pack_image_features"),
        (tiled.llava_onevision, "apply_pooling"),
        (merged.internvl, "pixel_shuffle"),
        (merged.idefics3, "connector.pixel_shuffle"),
        (merged.smolvlm, "connector.pixel_shuffle"),
    ],
)
def test_somebody_elses_patch_of_a_method_that_is_gone_around(make: Any, method: str) -> None:
    model = make()
    path, _, name = method.rpartition(".")
    setattr(model.model.get_submodule(path), name, lambda *given: given)
    with pytest.raises(PatchError, match=method):
        ocvtp.apply(model, "grid", keep=3)


def test_too_few_tiles_are_refused() -> None:
    model = tiled.llava_next()
    ocvtp.apply(model, "grid", keep=3)
    row = dict(tiled.make_rows(model)["two"])
    model(**row)
    row["pixel_values"] = row["pixel_values"][:, :2]
    with pytest.raises(
        ValueError, match=r"don't hold 2 image\(s\) of \[3, 5\] tiles, which image_sizes calls"
    ):
        model(**row)


@torch.no_grad()
def test_the_official_layout_needs_room_for_its_newline() -> None:
    """Its candidates are more than a narrow image has placeholders."""
    model = tiled.llava_next()
    row = {
        "input_ids": torch.tensor([[1, *[tiled.IMAGE] * 42, 7]]),
        "pixel_values": torch.randn(1, 4, 3, 56, 56, generator=torch.Generator().manual_seed(0)),
        "image_sizes": torch.tensor([[20, 150]]),
    }
    assert model(**row).logits.shape[1] == 44
    ocvtp.apply(model, "grid", keep=41, layout="official")
    assert model(**row).logits.shape[1] == 44
    for keep in (42, 63):
        ocvtp.apply(model, "grid", keep=keep, layout="official")
        with pytest.raises(ValueError, match=rf"can't keep {keep} tokens and a newline .* 42 placeholders"):
            model(**row)
    ocvtp.apply(model, "grid", keep=64, layout="official")  # all: as the model packs it
    assert model(**row).logits.shape[1] == 44


@torch.no_grad()
def test_too_few_placeholders_for_a_video_are_not_called_an_image() -> None:
    family = FAMILY["llava_onevision"]
    model, row = family.model(), dict(family.rows()["video"])
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    row["input_ids"] = row["input_ids"][:, [0, 1, 2, -1]]
    with pytest.raises(ValueError, match=r"\[1\] placeholders per row, but the images or videos"):
        model(**row)


@torch.no_grad()
def test_every_video_keeps_tokens_of_its_own() -> None:
    """Two videos in one prompt answer as one prompt after the other would be encoded."""
    family = FAMILY["llava_onevision"]
    model, row = family.model(), family.rows()["video"]
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    other = torch.randn(row["pixel_values_videos"].shape, generator=torch.Generator().manual_seed(8))
    both = torch.cat([row["pixel_values_videos"], other])
    ids = torch.cat([row["input_ids"]] * 2)
    together = model(input_ids=ids, pixel_values_videos=both).logits
    for i in range(2):
        alone = model(input_ids=ids[:1], pixel_values_videos=both[i : i + 1]).logits
        torch.testing.assert_close(together[i], alone[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_batch_num_images() -> None:
    """OneVision: a prompt of one image has it cut in tiles, one of several has them whole."""
    family = FAMILY["llava_onevision"]
    model = family.model()
    whole = 16 + 1  # tokens of an uncut picture and its newline
    row = [1, *[tiled.IMAGE] * len(tiled.ids(model, [0])[0]), 7, 8]
    several = [1, *[tiled.IMAGE] * whole, 9, *[tiled.IMAGE] * whole, 7]
    longest = max(len(row), len(several))
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in (row, several)])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in (row, several)])
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "batch_num_images": torch.tensor([1, 2]),
        **tiled.pictures([0, 1, 2]),
    }
    want = model(**inputs).logits
    ocvtp.apply(model, family.pruner(), keep=1.0)
    assert torch.equal(model(**inputs).logits, want)
    ocvtp.apply(model, family.pruner(), keep=3)
    assert model(**inputs).logits.shape[1] < want.shape[1]
