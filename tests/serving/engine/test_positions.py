"""Positions of kept tokens, which travel beside their rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ocvtp.serving.vllm.positions import Positions

MERGE, IMAGE = 2, 9


def model() -> Any:
    made: Any = object.__new__(Positions)
    made.plan = SimpleNamespace(layout=SimpleNamespace(unit=MERGE))
    made.config = SimpleNamespace(image_token_id=IMAGE)
    return made


def feature(offset: int, length: int, grid: tuple[int, int, int]) -> Any:
    place = SimpleNamespace(offset=offset, length=length)
    return SimpleNamespace(
        mm_position=place, data={"image_grid_thw": SimpleNamespace(data=torch.tensor(grid))}
    )


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_they_are_exact_in_half_precision(dtype: torch.dtype) -> None:
    """Beyond 256, which bfloat16 can't count to in ones."""
    height, width = 6, 1400
    slots = torch.tensor([0, 1, 699, 700, 1000, 1399, 2099])
    rows = torch.randn(len(slots), 16).to(dtype)
    grids = torch.tensor([[1, height, width]])
    (made,) = model().with_columns([rows], [slots], grids)
    assert made.dtype == dtype
    ids = [1, 2, *[IMAGE] * len(slots), 3, 4]
    positions, delta = model().get_mrope_input_positions(ids, [feature(2, len(slots), (1, height, width))])
    (left,), found, again = model().recompute_mrope_positions(torch.tensor(ids), [made], positions, 0)
    assert torch.equal(left, rows)
    assert found[0].tolist() == [0, 1, *[2] * len(slots), 702, 703]
    assert found[1, 2:9].tolist() == [2 + slot // 700 for slot in slots.tolist()]
    assert found[2, 2:9].tolist() == [2 + slot % 700 for slot in slots.tolist()]
    assert again == delta == 704 - len(ids)
    # The same once more, and from the middle of the image on, as a chunked prefill asks.
    _, twice, _ = model().recompute_mrope_positions(torch.tensor(ids), [made], found, 0)
    _, middle, late = model().recompute_mrope_positions(torch.tensor(ids), [made[3:]], found, 5)
    assert torch.equal(twice, found)
    assert torch.equal(middle, found)
    assert late == delta


@pytest.mark.quick
def test_two_images_and_a_prompt_that_ends_in_one() -> None:
    grids = torch.tensor([[1, 4, 8], [1, 8, 4]])
    slots = [torch.tensor([0, 7]), torch.tensor([3, 4])]
    made = model().with_columns([torch.zeros(2, 4), torch.zeros(2, 4)], slots, grids)
    ids = [5, IMAGE, IMAGE, 6, IMAGE, IMAGE]
    features = [feature(4, 2, (1, 8, 4)), feature(1, 2, (1, 4, 8))]  # in any order
    positions, delta = model().get_mrope_input_positions(ids, features)
    _, found, again = model().recompute_mrope_positions(torch.tensor(ids), made, positions, 0)
    assert found[0].tolist() == [0, 1, 1, 5, 6, 6]
    assert found[1].tolist() == [0, 1, 2, 5, 7, 8]
    assert found[2].tolist() == [0, 1, 4, 5, 7, 6]
    assert again == delta == 10 - len(ids)
    # While an answer is decoded vLLM asks at every step, and has no rows to show.
    positions.copy_(found)
    rows, same, later = model().recompute_mrope_positions(torch.tensor(ids), [], positions, len(ids))
    assert (list(rows), later) == ([], delta)
    assert same is positions
