"""The tensor arithmetic on prompts against a few lines of plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ocvtp.vlm.prompt import remap_kept_logits, restore_prompt, running_positions, squeeze, take
from tests.vlm.tiny_llava import IMAGE, PAD

TOTAL = 4


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], str]:
    """Rows of tokens with 0 to 3 images each, the kept placeholders of every image, and a padding side."""
    keep = draw(st.integers(1, TOTAL))
    rows, kept = [], []
    for _ in range(draw(st.integers(1, 4))):
        row = [1]
        for _ in range(draw(st.integers(0, 3))):
            row += [draw(st.integers(2, 9))] * draw(st.integers(0, 3)) + [IMAGE] * TOTAL
            kept.append(sorted(draw(st.permutations(range(TOTAL)))[:keep]))
        rows.append(row + [draw(st.integers(2, 9))] * draw(st.integers(0, 3)))
    return rows, kept, draw(st.sampled_from(["left", "right"]))


def naive(rows: list[list[int]], kept: list[list[int]]) -> list[list[int]]:
    """Columns that stay, per row."""
    image, out = 0, []
    for row in rows:
        columns, slot = [], 0
        for column, token in enumerate(row):
            if token != IMAGE:
                columns.append(column)
                continue
            if slot in kept[image]:
                columns.append(column)
            slot += 1
            if slot == TOTAL:
                image, slot = image + 1, 0
        out.append(columns)
    return out


@given(prompts(), st.booleans())
def test_squeeze_against_plain_python(
    case: tuple[list[list[int]], list[list[int]], str], masked: bool
) -> None:
    rows, kept, side = case
    width = max(map(len, rows))
    if not masked:  # without a mask padding is text like any other
        rows = [row + [3] * (width - len(row)) for row in rows]
    gaps = [width - len(row) for row in rows]
    left = [gap if side == "left" else 0 for gap in gaps]
    ids = torch.tensor(
        [[PAD] * a + row + [PAD] * (g - a) for row, g, a in zip(rows, gaps, left, strict=True)]
    )
    mask = torch.tensor(
        [[0] * a + [1] * len(row) + [0] * (g - a) for row, g, a in zip(rows, gaps, left, strict=True)]
    )
    slots = torch.tensor(kept, dtype=torch.long).reshape(len(kept), len(kept[0]) if kept else 1)
    columns, padded = squeeze(ids, IMAGE, slots, TOTAL, mask if masked else None, side)  # type: ignore[arg-type]
    wanted = [[c + a for c in row] for row, a in zip(naive(rows, kept), left, strict=True)]
    longest = max(map(len, wanted))
    for got, want in zip(columns.tolist(), wanted, strict=True):
        filler = [-1] * (longest - len(want))
        assert got == (filler + want if side == "left" else want + filler)
    assert padded == any(len(want) != longest for want in wanted)
    short = take(ids, columns, PAD)
    assert int((short == IMAGE).sum()) == slots.numel()


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=5, max_size=5), min_size=1, max_size=3), st.integers(0, 9)
)
def test_running_positions_skip_padding(rows: list[list[int]], start: int) -> None:
    got = running_positions(torch.tensor(rows), start)
    for row, positions in zip(rows, got.tolist(), strict=True):
        count = start
        for live, position in zip(row, positions, strict=True):
            assert position == (count if live else 0)
            count += live


def test_take_fills_padding() -> None:
    index = torch.tensor([[-1, 0, 2], [1, 2, -1]])
    assert take(torch.tensor([[5, 6, 7], [8, 9, 4]]), index, -100).tolist() == [[-100, 5, 7], [9, 4, -100]]


def test_remapping_kept_logits() -> None:
    index = torch.tensor([[0, 2, 5, 6], [0, 2, 5, 6]])
    assert remap_kept_logits(torch.tensor([6, 0, -1, -5]), index, 7).tolist() == [3, 0, 3, 1]
    with pytest.raises(ValueError, match="pruned"):
        remap_kept_logits(torch.tensor([3]), index, 7)
    with pytest.raises(ValueError, match="same columns"):
        remap_kept_logits(torch.tensor([0]), torch.tensor([[0, 1], [0, 2]]), 7)


def test_restoring_expanded_sequences() -> None:
    long = torch.tensor([[1, 2, 3], [4, 5, 6]])
    sequences = torch.tensor([[0, 7], [0, 8], [0, 9], [0, 10]])
    want = [[1, 2, 3, 7], [1, 2, 3, 8], [4, 5, 6, 9], [4, 5, 6, 10]]
    assert restore_prompt(sequences, long, 1).tolist() == want
