"""The packing of tiles against the models' own packers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from ocvtp.vlm.layouts.packing import ended_lines, packing, whole_picture

GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def upstream(height: int, width: int) -> tuple[int, torch.Tensor]:
    """Tiles, and the flat index behind every placeholder (-1: newline)."""
    vision = SimpleNamespace(image_size=336, patch_size=14)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=GRIDS))
    tiles = image_size_to_num_patches([height, width], GRIDS, 336)
    index = torch.arange(tiles * 576, dtype=torch.float64).view(tiles, 576, 1)
    newline = torch.full((1,), -1.0, dtype=torch.float64)
    packed, _ = LlavaNextModel.pack_image_features(
        model, [index], [[height, width]], "full", image_newline=newline
    )
    return tiles, packed[0][:, 0].long()


@settings(max_examples=60)
@given(st.integers(20, 3000), st.integers(20, 3000))
def test_packing_is_the_models_own(height: int, width: int) -> None:
    tiles, want = upstream(height, width)
    got = packing(height, width, tuple(map(tuple, GRIDS)), 336, 24)  # type: ignore[arg-type]
    assert (got.tiles, got.total) == (tiles, len(want))
    assert torch.equal(got.slots, (want >= 0).nonzero()[:, 0])
    assert torch.equal(got.tokens, want[want >= 0])
    assert torch.equal(got.newlines, (want < 0).nonzero()[:, 0])
    ends = torch.cat([got.newlines, torch.tensor([575])])[got.rows]  # -1: the last one, which no line is
    # The newline of a candidate is the next one after it.
    after = torch.searchsorted(got.newlines, got.slots[576:])
    assert torch.equal(got.newlines[after], ends[576:])
    assert bool((got.rows[:576] == -1).all())


@settings(max_examples=40)
@example(600, 672, 3)  # 1.08 times too many along a side: let be
@example(650, 600, 3)  # 1.106 times
@given(st.integers(20, 3000), st.integers(20, 3000), st.integers(1, 4))
def test_shrinking_is_the_models_own(height: int, width: int, most: int) -> None:
    """LLaVA-OneVision, which shrinks stitched tiles beyond ``most`` tiles' worth of tokens."""
    vision = SimpleNamespace(image_size=336, patch_size=14)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=GRIDS))
    tiles = image_size_to_num_patches([height, width], GRIDS, 336)
    newline = torch.full((1,), -1.0)
    packed, _ = LlavaOnevisionModel.pack_image_features(
        model,
        [torch.ones(tiles, 576, 1)],
        [[height, width]],
        image_newline=newline,
        vision_aspect_ratio=f"anyres_max_{most}",
    )
    want = packed[0][:, 0]
    got = packing(height, width, tuple(map(tuple, GRIDS)), 336, 24, most)  # type: ignore[arg-type]
    assert (got.tiles, got.total) == (tiles, len(want))
    assert torch.equal(got.slots, (want > 0).nonzero()[:, 0])
    assert torch.equal(got.newlines, (want < 0).nonzero()[:, 0])


@pytest.mark.parametrize(
    ("height", "width", "tiles", "total"),
    [
        (480, 640, 5, 2340),
        (427, 640, 5, 2144),
        (1080, 1920, 5, 1948),
        (336, 336, 3, 1176),
        (200, 1000, 4, 1598),
    ],
)
def test_counts_of_the_released_grids(height: int, width: int, tiles: int, total: int) -> None:
    got = packing(height, width, tuple(map(tuple, GRIDS)), 336, 24)  # type: ignore[arg-type]
    assert (got.tiles, got.total) == (tiles, total)


def test_lines_that_keep_a_token_end_in_their_newline() -> None:
    one = packing(500, 700, tuple(map(tuple, GRIDS)), 336, 24)  # type: ignore[arg-type]
    packed, alone = (one, one, one), whole_picture(4)
    kept = [torch.tensor([3, 575]), torch.tensor([2, 576, 700, 701]), torch.arange(len(one.slots))]
    want = [one.newlines[:0], one.newlines[one.rows[[576, 700]].unique()], one.newlines]
    assert all(map(torch.equal, ended_lines(packed, kept), want))
    assert torch.equal(ended_lines([alone], [torch.tensor([0])])[0], alone.newlines)


def test_a_packing_moves_as_one_tensor() -> None:
    one = packing(500, 700, tuple(map(tuple, GRIDS)), 336, 24)  # type: ignore[arg-type]
    assert one.to(torch.device("cpu")) is one
    moved = one.to(torch.device("meta"))
    for name in ("tokens", "slots", "newlines", "rows"):
        here, there = getattr(one, name), getattr(moved, name)
        assert (there.device.type, there.shape, there.dtype) == ("meta", here.shape, here.dtype)
    assert len({getattr(moved, name).untyped_storage()._cdata for name in ("tokens", "slots")}) == 1
    assert (moved.tiles, moved.total, moved.grid) == (one.tiles, one.total, one.grid)
