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
    short_columns,
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
def prompts(draw: st.DrawFn) -> list[list[int | Item]]:
    """Rows of text tokens and items."""
    rows: list[list[int | Item]] = []
    for _ in range(draw(st.integers(1, 4))):
        row: list[int | Item] = [1]
        for _ in range(draw(st.integers(0, 3))):
            row += [draw(st.integers(2, 9))] * draw(st.integers(0, 3))
            total = draw(st.integers(1, 5))
            kept = sorted(draw(st.permutations(range(total)))[: draw(st.integers(1, total))])
            row.append(Item(draw(st.sampled_from([IMAGE, VIDEO])), total, kept))
        rows.append(row + [draw(st.integers(2, 9))] * draw(st.integers(0, 3)))
    return rows


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


@given(prompts(), st.data(), st.booleans(), st.booleans())
def test_squeeze_against_plain_python(
    parts: list[list[int | Item]], data: st.DataObject, masked: bool, trailing: bool
) -> None:
    rows, stays = map(list, zip(*map(spelled, parts), strict=True))
    width = max(map(len, rows)) + data.draw(st.integers(0, 3))
    left = [data.draw(st.integers(0, width - len(row))) for row in rows]
    right = [width - len(row) - gap for row, gap in zip(rows, left, strict=True)]
    ids = torch.tensor([[PAD] * a + row + [PAD] * b for row, a, b in zip(rows, left, right, strict=True)])
    mask = torch.tensor(
        [[0] * a + [1] * len(row) + [0] * b for row, a, b in zip(rows, left, right, strict=True)]
    )
    wanted = [[column + a for column in stay] for stay, a in zip(stays, left, strict=True)]
    dropped = [
        column + a
        for row, stay, a in zip(rows, stays, left, strict=True)
        for column in range(len(row))
        if column not in stay
    ]
    if not masked:  # without a mask padding is text like any other
        wanted = [
            sorted([*stay, *range(a), *range(width - b, width)])
            for stay, a, b in zip(wanted, left, right, strict=True)
        ]
    dropping = [placeholders(parts, token) for token in (IMAGE, VIDEO)]
    columns, padded = squeeze(ids, dropping, mask if masked else None, trailing=trailing)
    if masked and trailing:
        behind = max(dropped, default=-1) + 1
        wanted = _with_padding(wanted, mask.tolist(), right, behind)
        for k in range(width - behind + 1):  # columns counted from the end are the same columns
            assert columns[:, columns.shape[1] - k :].tolist() == [[*range(width - k, width)]] * len(rows)
    longest = max(map(len, wanted))
    assert columns.tolist() == [[-1] * (longest - len(want)) + want for want in wanted]
    assert padded == any(len(want) != longest for want in wanted)
    short = take(ids, columns, PAD)
    for some in dropping:
        assert int((short == some.token_id).sum()) == len(some.places)
    long = short_columns(columns, width)
    for row, numbers in enumerate(long.tolist()):
        for column, number in enumerate(numbers):
            assert (column in wanted[row]) == (number >= 0)
            assert number < 0 or columns[row, number] == column


def _with_padding(
    stays: list[list[int]], mask: list[list[int]], right: list[int], behind: int
) -> list[list[int]]:
    """Padding at a row's end, or behind all that is dropped, stays as far as there is room."""
    width = len(mask[0])
    room = max(
        len(stay) + sum(not live for live in row[behind:]) for stay, row in zip(stays, mask, strict=True)
    )
    made = []
    for stay, row, gap in zip(stays, mask, right, strict=True):
        blank = [
            column
            for column in reversed(range(width))
            if not row[column] and column >= min(behind, width - gap)
        ]
        made.append(sorted([*stay, *blank[: room - len(stay)]]))
    return made


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
