"""The tensor arithmetic on prompts against a few lines of plain Python."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ocvtp.vlm.call.prompt import (
    Placeholders,
    check_placeholders,
    remap_kept_logits,
    restore_prompt,
    running_positions,
    squeeze,
    take,
)

IMAGE, VIDEO, PAD = 50, 51, 0


@dataclass
class Item:
    """An image or video of a prompt: its placeholder, how many there are, and which stay."""

    token: int
    total: int
    kept: list[int]


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[list[int | Item]], str]:
    """Rows of text tokens and items, and a side to pad on."""
    rows: list[list[int | Item]] = []
    for _ in range(draw(st.integers(1, 4))):
        row: list[int | Item] = [1]
        for _ in range(draw(st.integers(0, 3))):
            row += [draw(st.integers(2, 9))] * draw(st.integers(0, 3))
            total = draw(st.integers(1, 5))
            kept = sorted(draw(st.permutations(range(total)))[: draw(st.integers(1, total))])
            row.append(Item(draw(st.sampled_from([IMAGE, VIDEO])), total, kept))
        rows.append(row + [draw(st.integers(2, 9))] * draw(st.integers(0, 3)))
    return rows, draw(st.sampled_from(["left", "right"]))


def spelled(row: list[int | Item]) -> tuple[list[int], list[int]]:
    """Token ids of a row, and the columns that stay."""
    ids: list[int] = []
    stay: list[int] = []
    for part in row:
        if isinstance(part, Item):
            stay += [len(ids) + slot for slot in part.kept]
            ids += [part.token] * part.total
        else:
            stay.append(len(ids))
            ids.append(part)
    return ids, stay


def placeholders(rows: list[list[int | Item]], token: int) -> Placeholders:
    items = [part for row in rows for part in row if isinstance(part, Item) and part.token == token]
    places, start = [], 0
    for item in items:
        places += [start + slot for slot in item.kept]
        start += item.total
    return Placeholders(token, tuple(item.total for item in items), torch.tensor(places, dtype=torch.long))


@given(prompts(), st.booleans())
def test_squeeze_against_plain_python(case: tuple[list[list[int | Item]], str], masked: bool) -> None:
    parts, side = case
    rows, stays = map(list, zip(*map(spelled, parts), strict=True))
    width = max(map(len, rows))
    if not masked:  # without a mask padding is text like any other
        stays = [[*stay, *range(len(row), width)] for row, stay in zip(rows, stays, strict=True)]
        rows = [row + [3] * (width - len(row)) for row in rows]
    gaps = [width - len(row) for row in rows]
    left = [gap if side == "left" else 0 for gap in gaps]
    ids = torch.tensor(
        [[PAD] * a + row + [PAD] * (g - a) for row, g, a in zip(rows, gaps, left, strict=True)]
    )
    mask = torch.tensor(
        [[0] * a + [1] * len(row) + [0] * (g - a) for row, g, a in zip(rows, gaps, left, strict=True)]
    )
    dropping = [placeholders(parts, token) for token in (IMAGE, VIDEO)]
    columns, padded = squeeze(ids, dropping, mask if masked else None, side)  # type: ignore[arg-type]
    wanted = [[c + a for c in stay] for stay, a in zip(stays, left, strict=True)]
    longest = max(map(len, wanted))
    for got, want in zip(columns.tolist(), wanted, strict=True):
        filler = [-1] * (longest - len(want))
        assert got == (filler + want if side == "left" else want + filler)
    assert padded == any(len(want) != longest for want in wanted)
    short = take(ids, columns, PAD)
    for some in dropping:
        assert int((short == some.token_id).sum()) == len(some.places)


def test_placeholders_of_whole_images_in_every_row() -> None:
    check_placeholders([3, 0, 9], [3, 4, 5])
    check_placeholders([0, 0], [])
    for per_row in ([4, 8], [3, 4, 4], [3, 9, 1], [12, 0, 1], [5, 7]):
        with pytest.raises(ValueError, match="placeholders per row"):
            check_placeholders(per_row, [3, 4, 5])


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
    rows = torch.tensor([[5, 6, 7], [8, 9, 4]])
    assert take(rows, index, -100).tolist() == [[-100, 5, 7], [9, 4, -100]]
    both = take(torch.stack([rows, rows + 10]), index, -100)
    assert both[1].tolist() == [[-100, 15, 17], [19, 14, -100]]


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
