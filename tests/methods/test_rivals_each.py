"""Published methods one by one: against plain loops, and where they refuse."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ocvtp import methods
from ocvtp.methods import tome
from tests.methods.rivals import TOKENS, Inputs, inputs

SEEDS = range(4)


def cosine(x: torch.Tensor) -> torch.Tensor:
    unit = x / x.norm(dim=-1, keepdim=True)
    return unit @ unit.mT


def double(seed: int, batch: int = 1) -> Inputs:
    return inputs(batch, seed=seed).each(torch.Tensor.double)


def ranked(scores: torch.Tensor) -> list[int]:
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda token: (-values[token], token))


# -------------------------------------------------------------------------------------------------- HiPrune


def hiprune_by_loops(
    middle: torch.Tensor, deep: torch.Tensor, keep: int, width: int, alpha: float
) -> list[int]:
    total = len(middle)
    kept: set[int] = set()
    for anchor in ranked(middle)[: round(keep * alpha / 5)]:
        for near in (anchor, anchor - 1, anchor + 1, anchor - width, anchor + width):
            kept.add(min(max(near, 0), total - 1))
    for token in ranked(deep):
        if len(kept) < keep:
            kept.add(token)
    return sorted(kept)


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (32, 2), (64, 1)])
@pytest.mark.parametrize(
    ("keep", "alpha"), [(25, 0.1), (26, 0.1), (20, 1.0), (12, 0.0), (63, 0.9), (64, 0.9)]
)
def test_hiprune_by_loops(shape: tuple[int, int], keep: int, alpha: float) -> None:
    for seed in SEEDS:
        x = inputs(2, seed=seed)
        found = methods.hiprune(x.row, x.other_row, keep, shape=shape, alpha=alpha).indices
        for image in range(2):
            want = hiprune_by_loops(x.row[image], x.other_row[image], keep, shape[1], alpha)
            assert found[image].tolist() == want


def test_hiprune_refuses_anchors_beyond_the_budget() -> None:
    x = inputs()
    for keep in range(1, 65):
        for hundredths in range(0, 101, 5):
            alpha = hundredths / 100
            if 5 * round(keep * alpha / 5) <= keep:
                methods.hiprune(x.row, x.other_row, keep, shape=(8, 8), alpha=alpha)
                continue
            with pytest.raises(ValueError, match=r"alpha must be below") as caught:
                methods.hiprune(x.row, x.other_row, keep, shape=(8, 8), alpha=alpha)
            below = float(str(caught.value).rsplit(" ", 1)[1]) - 1e-3
            methods.hiprune(x.row, x.other_row, keep, shape=(8, 8), alpha=max(below, 0.0))
    for alpha, error in (
        (1.1, ValueError),
        (-0.1, ValueError),
        ("0.1", TypeError),
        (float("nan"), ValueError),
    ):
        with pytest.raises(error, match="alpha must be"):
            methods.hiprune(x.row, x.other_row, 9, shape=(8, 8), alpha=alpha)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="64 tokens are not 8 x 9"):
        methods.hiprune(x.row, x.other_row, 9, shape=(8, 9))


# ----------------------------------------------------------------------------------------------------- TRIM


def test_trim_keeps_what_is_least_like_the_text() -> None:
    for seed in SEEDS:
        x = double(seed, 2)
        found = methods.trim(x.features[:, 1:], x.image_embeds, x.text, 11)
        for image in range(2):
            order = ranked(-(x.image_embeds[image] @ x.text[image]))
            kept, rest = sorted(order[:10]), sorted(order[10:])
            assert found.slots[image].tolist() == [*kept, rest[-1]]
            patches = x.features[image, 1:]
            assert torch.equal(found.rows[image, :10], patches[kept])
            assert torch.allclose(found.rows[image, 10], patches[rest].mean(dim=0))
            assert all(found.owner[image, token] == 10 for token in rest)


def test_trim_of_everything_and_of_a_single_row() -> None:
    x = inputs()
    patches = x.features[:, 1:]
    whole = methods.trim(patches, x.image_embeds, x.text, TOKENS).by_place()
    assert torch.equal(whole.rows, patches)
    one = methods.trim(patches, x.image_embeds, x.text, 1)
    assert torch.allclose(one.rows[:, 0], patches.mean(dim=1), atol=1e-6)
    assert one.slots.tolist() == [[TOKENS - 1]] * 3


def test_trims_adaptive_budget_without_outliers_is_the_mean_alone() -> None:
    same = torch.ones(2, 9, 4)
    assert methods.trim_budget(same, torch.ones(2, 4)) == 1
    same[0, 3] = -4.0
    same[1, 8] = -4.0
    assert methods.trim_budget(same, torch.ones(2, 4)) == 2
    for empty in (same[:0], same[:, :0]):
        with pytest.raises(ValueError, match="without tokens none stands out"):
            methods.trim_budget(empty, torch.ones(len(empty), 4))


def test_quartiles_are_interpolated_linearly() -> None:
    from ocvtp.methods._outliers import outliers

    for seed, total in itertools.product(SEEDS, (5, 33, 64, 577)):
        scores = torch.randn(2, total, generator=torch.Generator().manual_seed(seed)).exp()
        low, high = (torch.quantile(scores.flatten(), share) for share in (0.25, 0.75))
        assert outliers(scores) == int((scores > high + 1.5 * (high - low)).sum())


# ------------------------------------------------------------------------------------------------ VisionZip


def visionzip_by_loops(
    patches: torch.Tensor, scores: torch.Tensor, keys: torch.Tensor, dominant: int, contextual: int
) -> tuple[list[int], list[int], torch.Tensor]:
    kept = sorted(ranked(scores)[:dominant])
    left = [token for token in range(len(scores)) if token not in kept]
    targets = left[:: max(1, len(left) // contextual)][:contextual]
    similar = cosine(keys)
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for token in left:
        if token not in targets:
            joined[max(targets, key=lambda target: similar[token, target].item())].append(token)
    rows = [patches[t] + (patches[m].mean(dim=0) if m else 0.0) for t, m in joined.items()]
    return kept, targets, torch.stack(rows)


@pytest.mark.parametrize(("dominant", "contextual"), [(1, 1), (20, 7), (20, 31), (40, 25), (60, 3), (64, 1)])
def test_visionzip_by_loops(dominant: int, contextual: int) -> None:
    for seed in SEEDS:
        x = double(seed, 2)
        found = methods.visionzip(x.features, x.row, x.keys, dominant, contextual)
        merged = methods.visionzip_merged(x.features[:, 1:], x.row, x.keys[:, 1:], dominant - 1, contextual)
        assert torch.equal(found.rows[:, 0], x.features[:, 0])
        for image in range(2):
            patches = x.features[image, 1:]
            kept, targets, rows = visionzip_by_loops(
                patches, x.row[image], x.keys[image, 1:], dominant - 1, contextual
            )
            assert found.slots[image, 1:].tolist() == kept + targets
            assert torch.equal(found.rows[image, 1:dominant], patches[kept])
            assert torch.allclose(found.rows[image, dominant:], rows)
            assert merged.slots[image].tolist() == sorted(kept + targets)
            order = found.slots[image, 1:].argsort()
            assert torch.equal(merged.rows[image], found.rows[image, 1:][order])


def test_visionzip_with_as_many_rows_as_tokens() -> None:
    x = inputs()
    found = methods.visionzip(x.features, x.row, x.keys, 60, 5)
    assert found.slots[:, 0].tolist() == [-1] * 3
    assert found.slots[:, 1:].sort(dim=1).values.tolist() == [list(range(64))] * 3
    by_place = found.by_place()
    assert torch.equal(by_place.rows, x.features)
    with pytest.raises(ValueError, match=r"contextual must be between 1 and 5 \(the tokens left over"):
        methods.visionzip(x.features, x.row, x.keys, 60, 6)
    with pytest.raises(ValueError, match="dominant must be between 1 and 64"):
        methods.visionzip(x.features, x.row, x.keys, 0, 6)
    with pytest.raises(ValueError, match="contextual must be between 1 and 4"):
        methods.visionzip_merged(x.features[:, 1:], x.row, x.keys[:, 1:], 60, 5)
    with pytest.raises(TypeError, match="dominant must be an int"):
        methods.visionzip_merged(x.features[:, 1:], x.row, x.keys[:, 1:], 0.0, 5)  # type: ignore[arg-type]
    none = methods.visionzip_merged(x.features[:, 1:], x.row, x.keys[:, 1:], 0, 5)
    assert none.slots.tolist() == [[0, 12, 24, 36, 48]] * 3


def test_rows_of_visionzips_tiles_go_by_lines_of_the_picture() -> None:
    dominant = torch.tensor([[0, 3], [1, 2], [0, 3]])  # base, left and right tile of 2 x 2 patches
    order = methods.visionzip_tiles(dominant, 1, tiles=(1, 2), side=2)
    # Each has a class token, two dominant rows and a contextual one.
    assert order.tolist() == [0, 1, 2, 3, 5, 9, 6, 10, 4, 8, 7, 11]
    with pytest.raises(TypeError, match="dominant must be int64"):
        methods.visionzip_tiles(dominant.int(), 1, tiles=(1, 2), side=2)
    with pytest.raises(ValueError, match="dominant must have shape"):
        methods.visionzip_tiles(dominant, 1, tiles=(2, 2), side=2)


# ------------------------------------------------------------------------------------------------- PruMerge


@pytest.mark.parametrize("spread", [0.0, 0.5, 0.75, 1.0])
def test_prumerge_by_loops(spread: float) -> None:
    for seed, (keep, neighbours) in itertools.product(SEEDS, [(1, 9), (17, 9), (33, 32), (64, 100), (20, 0)]):
        x = double(seed)
        patches, keys, row = x.features[:, 1:], x.keys[:, 1:], x.row
        found = methods.prumerge(patches, row, keys, keep, spread=spread, neighbours=neighbours)
        even = int((keep - 1) * spread)
        order = ranked(row[0])[: keep - 1 - even]
        left = [token for token in range(TOKENS) if token not in order]
        order += [left[(2 * i + 1) * len(left) // (2 * even)] for i in range(even)]
        assert found.slots[0, :-1].tolist() == order
        similar, rows = cosine(keys[0]), []
        for token in order:
            near = [other for other in ranked(similar[token]) if other != token][:neighbours]
            rows.append(patches[0, token] + sum(row[0, other] * patches[0, other] for other in near))
        rest = [token for token in range(TOKENS) if token not in order]
        rows.append((row[0, rest, None] * patches[0, rest]).sum(dim=0))
        assert torch.allclose(found.rows[0], torch.stack(rows))
        assert (found.owner[0, rest] == -1).all()
        assert found.owner[0, order].tolist() == list(range(keep - 1))


def test_a_quarter_of_prumerge_plus_is_by_attention() -> None:
    x = inputs()
    for keep, attended in ((64, 16), (32, 8), (16, 4)):
        found = methods.prumerge(x.features[:, 1:], x.row, x.keys[:, 1:], keep, spread=0.75)
        best = methods.attention_top_k(x.row, attended).indices
        assert torch.equal(found.slots[:, :attended].sort(dim=1).values, best)
        spread = found.slots[:, attended:-1]
        assert (spread.diff(dim=1) > 0).all()


def test_prumerges_published_budgets() -> None:
    x = inputs(1)
    of = (x.features[:, 1:], x.row, x.keys[:, 1:])
    assert methods.prumerge_published(*of, ratio=0.25).rows.shape[1] == 17
    assert methods.prumerge_published(*of, ratio=0.0).rows.shape[1] == 1
    plus = methods.prumerge_published(*of, ratio=0.25, plus=True).slots[0].tolist()
    assert set(plus) >= set(range(2, 63, 4))
    with pytest.raises(ValueError, match="one at a time, not 3"):
        methods.prumerge_published(*(part.expand(3, -1, *part.shape[2:]) for part in of), plus=True)
    with pytest.raises(ValueError, match="no token stands out"):
        methods.prumerge_published(of[0], torch.ones(1, TOKENS), of[2], plus=True)
    for ratio in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="ratio must be"):
            methods.prumerge_published(*of, ratio=ratio, plus=True)
    with pytest.raises(ValueError, match="neighbours must be an int of at least 0"):
        methods.prumerge(*of, 9, neighbours=-1)
    with pytest.raises(ValueError, match="spread must be from 0 to 1"):
        methods.prumerge(*of, 9, spread=1.5)


def test_one_head_row_is_a_softmax_without_the_class_token() -> None:
    x = inputs()
    whole = (x.keys[:, :1] @ x.keys.mT / 8**0.5).softmax(dim=2)[:, 0]
    row = methods.one_head_row(x.keys[:, 0], x.keys)
    assert torch.allclose(row, whole[:, 1:], atol=1e-7)
    assert methods.one_head_row(x.keys[:, 0].half(), x.keys.half()).dtype == torch.float32
    with pytest.raises(ValueError, match="query must have shape"):
        methods.one_head_row(x.keys[:2, 0], x.keys)


# ------------------------------------------------------------------------------------------------ VisPruner


def vispruner_by_loops(
    patches: torch.Tensor, row: torch.Tensor, keep: int, share: float, step: int
) -> list[int]:
    order, attended, similar = ranked(row), int(keep * share), cosine(patches)
    kept, left = order[:attended], order[attended:] if keep > attended else []
    while len(left) > keep - attended:
        first, second = left[::2], left[1::2]
        scores = similar[first][:, second].amax(dim=1)
        drop = min(step, len(left) - (keep - attended), len(first))
        left = [first[i] for i in ranked(scores)[drop:]] + second
    return kept + left


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("step", [1, 8, 100])
def test_vispruner_by_loops(share: float, step: int) -> None:
    for seed, keep in itertools.product(SEEDS, (1, 2, 9, 32, 61, 64)):
        x = double(seed)
        want = vispruner_by_loops(x.features[0, 1:], x.row[0], keep, share, step)
        found = methods.vispruner_order(x.features[:, 1:], x.row, keep, important=share, step=step)
        assert found[0].tolist() == want
        kept = methods.vispruner(x.features[:, 1:], x.row, keep, important=share, step=step)
        assert kept.indices[0].tolist() == sorted(want)


def test_vispruner_refuses() -> None:
    x = inputs()
    with pytest.raises(ValueError, match="important must be from 0 to 1"):
        methods.vispruner(x.features[:, 1:], x.row, 9, important=1.5)
    for step in (0, 1.5):
        with pytest.raises(ValueError, match="step must be an int of at least 1"):
            methods.vispruner(x.features[:, 1:], x.row, 9, step=step)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- DivPrune


def test_divprune_by_loops() -> None:
    for seed in SEEDS:
        x = double(seed)
        distance = 1 - cosine(x.projected[0])
        others = distance + 9 * torch.eye(TOKENS, dtype=torch.float64)
        kept = [int(others.amin(dim=1).argmax())]
        while len(kept) < TOKENS:
            left = [token for token in range(TOKENS) if token not in kept]
            kept.append(max(left, key=lambda token: distance[token, kept].min().item()))
        assert methods.divprune_order(x.projected, TOKENS)[0].tolist() == kept
        for keep in (1, 2, 30):
            assert methods.divprune(x.projected, keep).indices[0].tolist() == sorted(kept[:keep])


def test_divprune_is_farthest_points_of_unit_rows_from_another_start() -> None:
    from ocvtp_kernels.diversity import farthest_points

    x = double(0, 3)
    order = methods.divprune_order(x.projected, 30)
    start = torch.full_like(order, -1)
    start[:, 0] = order[:, 0]
    unit = torch.nn.functional.normalize(x.projected, dim=2)
    assert torch.equal(farthest_points(unit, 30, start=start, ascending=False), order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divprune_takes_copies_last_and_in_order(dtype: torch.dtype) -> None:
    x = inputs().projected[:, :20].to(dtype)
    copies = torch.cat([x, x, x], dim=1)
    order = methods.divprune_order(copies, 60)
    assert all(len({token % 20 for token in row[:20]}) == 20 for row in order.tolist())
    for row in order.tolist():
        assert row[20:] == sorted(row[20:])


# ------------------------------------------------------------------------------------------------- CDPruner


def test_cdpruner_adds_the_largest_volume() -> None:
    for seed in SEEDS:
        x = double(seed)
        kernel = x.row[0, :, None] * cosine(x.projected[0]) * x.row[0]
        kept = [int(x.row[0].argmax())]
        for _ in range(6):
            left = [token for token in range(TOKENS) if token not in kept]
            kept.append(
                max(
                    left, key=lambda token: torch.linalg.det(kernel[[*kept, token]][:, [*kept, token]]).item()
                )
            )
        assert methods.cdpruner_order(x.projected, x.row, 7)[0].tolist() == kept
        assert methods.cdpruner(x.projected, x.row, 7).indices[0].tolist() == sorted(kept)


def cdpruner_by_elimination(x: torch.Tensor, relevance: torch.Tensor, keep: int) -> list[int]:
    """Every choice is taken out of what is left of all pairs."""
    left = cosine(x)
    left.fill_diagonal_(1.0)
    kept: list[int] = []
    for _ in range(keep):
        own = left.diagonal()
        volume = relevance.square() * torch.where(own < 1e-5, 0.0, own)
        volume[kept] = -1.0
        kept.append(int(volume.argmax()))
        direction = left[kept[-1]] / own[kept[-1]].clamp(min=1e-5).sqrt()
        left = left - direction[:, None] * direction
    return kept


@pytest.mark.parametrize("keep", [1, 2, 3, 20, 39, 50, 64])
def test_cdpruner_by_elimination(keep: int) -> None:
    for seed in SEEDS:
        x = double(seed, 2)
        found = methods.cdpruner_order(x.projected, x.row, keep).tolist()
        for image in range(2):
            assert found[image] == cdpruner_by_elimination(x.projected[image], x.row[image], keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [34, 67, 131])
def test_cdpruner_takes_the_first_of_copies_wherever_they_stand(tokens: int, dtype: torch.dtype) -> None:
    """The last columns of a library's loop may be rounded otherwise than the first."""
    half = (tokens + 1) // 2
    draw = torch.randint(0, 2, (3, half, 16), generator=torch.Generator().manual_seed(tokens))
    x = (2.0 * draw - 1.0).to(dtype)  # cosines are exact
    x = torch.cat([x, x[:, : tokens - half].flip(1)], dim=1)
    order = methods.cdpruner_order(x, x.new_ones(3, tokens), 16)
    assert order.max() < half


class Entries(TorchDispatchMode):
    """Counts entries of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        self.made += result.numel() if isinstance(result, torch.Tensor) else 0
        return result


def test_cdpruner_goes_over_all_pairs_once() -> None:
    x = inputs(1, tokens=600)
    made = []
    for keep in (1, 31):
        with Entries() as entries:
            methods.cdpruner_order(x.projected, x.row, keep)
        made.append(entries.made)
    assert made[1] - made[0] < 30 * 600**2 / 4


def test_cdpruner_beyond_the_rank_keeps_each_token_once() -> None:
    x = inputs()
    narrow = x.projected[:, :, :5]
    order = methods.cdpruner_order(narrow, x.row, TOKENS)
    for row in order.tolist():
        assert sorted(row) == list(range(TOKENS))
        assert row[5:] == sorted(row[5:])


def test_cdpruner_far_beyond_the_rank_stays_finite() -> None:
    """Rounding of residuals that are 0 must not grow until it chooses."""
    for seed in range(37, 240, 20):
        x = torch.randn(2, 309, 40, generator=torch.Generator().manual_seed(seed))
        x[:, 154:] = x[:, :155].flip(1)
        for row in methods.cdpruner_order(x, x.new_ones(2, 309), 309).tolist():
            assert sorted(row) == list(range(309))
            assert row[40:] == sorted(row[40:])


def test_cdpruner_takes_a_token_without_direction_late() -> None:
    x = inputs()
    x.projected[:, 7] = 0.0
    x.row[:, 7] = 10.0
    assert not (methods.cdpruner_order(x.projected, x.row, 30) == 7).any()


def test_relevance_of_tiles_and_pictures() -> None:
    x = inputs(4)
    texts = [
        torch.randn(pieces, 12, generator=torch.Generator().manual_seed(pieces)) for pieces in (1, 3, 3, 2)
    ]
    alone = methods.relevance_of(x.image_embeds, texts)
    for image in range(4):
        unit = torch.nn.functional.normalize(x.image_embeds[image], dim=1)
        text = torch.nn.functional.normalize(texts[image], dim=1)
        values = -(unit @ text.mT).mean(dim=1)
        want = (values - values.min() + 1e-6) / (values.max() - values.min())
        assert torch.allclose(alone[image], want, atol=1e-5)
        single = methods.relevance_of(x.image_embeds[image : image + 1], [texts[image]])
        assert torch.equal(single[0], alone[image])
    assert torch.equal(methods.relevance_of(x.image_embeds, texts, pictures=[5, 3, 9, 4]), alone)
    assert alone.amin(dim=1).max() < 1e-5
    assert alone.amax(dim=1).min() > 1 - 1e-5
    tiled = methods.relevance_of(x.image_embeds, texts, pictures=[0, 1, 1, 0])
    for tiles in ([0, 3], [1, 2]):
        assert tiled[tiles].amin() < 1e-5
        assert tiled[tiles].amax() > 1 - 1e-5
        assert not torch.allclose(tiled[tiles], alone[tiles], atol=1e-3)
    stacked = methods.relevance_of(x.image_embeds, torch.stack([texts[1], texts[2], texts[1], texts[2]]))
    assert torch.equal(stacked[1:2], alone[1:2])


def test_relevance_refuses_and_is_1_where_it_is_flat() -> None:
    x = inputs()
    text = x.text[:, None]
    flat = x.image_embeds[:, :1].expand(-1, 9, -1)
    assert torch.equal(methods.relevance_of(flat, text), torch.ones(3, 9))
    for given, pictures, message in (
        (text[:2], None, "text_embeds must be of 3 images; got 2"),
        (text, [0, 1], "pictures must be of 3 images; got 2"),
        (text[:, :, :3], None, "text_embeds must have shape"),
        (text[:, :0], None, "text_embeds has no pieces"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.relevance_of(x.image_embeds, given, pictures=pictures)


# ----------------------------------------------------------------------------------------------------- ToMe


def test_schedules() -> None:
    assert tome.schedule(3, 5) == [5, 5, 5]
    assert tome.schedule(12, (8, 1.0)) == [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]
    assert tome.schedule(6, [3, 2]) == [3, 2, 0, 0, 0, 0]
    assert tome.schedule(6, (3, 2)) == [3, 2, 0, 0, 0, 0]
    assert tome.schedule(1, (7, 0.3)) == [4]
    for r, error, message in (
        ([1, 2, 3], ValueError, "r has 3 numbers for 2 blocks"),
        (-1, ValueError, "r must not be negative"),
        ("16", TypeError, "r must be an int"),
        ([1.5], TypeError, "r must be an int"),
    ):
        with pytest.raises(error, match=message):
            tome.schedule(2, r)  # type: ignore[arg-type]


def test_even_schedules() -> None:
    for keep, want in (
        (192, [17] * 16 + [16] * 7),
        (128, [20] * 11 + [19] * 12),
        (64, [23] * 6 + [22] * 17),
        (32, [24] * 15 + [23] * 8),
        (576, [0] * 23),
    ):
        assert tome.even_schedule(576, keep, 23) == want
    for tokens, blocks, keep in itertools.product((1, 2, 31, 576), (1, 3, 23), range(1, 40)):
        least, left = tokens, tokens
        for _ in range(blocks):
            least -= least // 2
        if keep > tokens:
            continue
        if keep < least:
            with pytest.raises(ValueError, match=f"{tokens} tokens to {least} at least"):
                tome.even_schedule(tokens, keep, blocks)
            continue
        numbers = tome.even_schedule(tokens, keep, blocks)
        assert len(numbers) == blocks
        assert numbers == sorted(numbers, reverse=True)
        for number in numbers:
            assert 0 <= number <= left // 2  # what a step takes, with or without a class token
            left -= number
        assert left == keep
    with pytest.raises(ValueError, match="keep must be between 1 and 576"):
        tome.even_schedule(576, 0, 23)
    with pytest.raises(ValueError, match="blocks must be an int of at least 1"):
        tome.even_schedule(576, 9, 0)


@pytest.mark.parametrize("class_token", [True, False])
def test_steps_keep_account_of_every_token(class_token: bool) -> None:
    x = inputs(2)
    rows, size = x.features.double(), torch.ones(2, 65, 1)
    owner = torch.arange(65).repeat(2, 1)
    for r in (10, 0, 20, 3, 100):
        before = rows.shape[1]
        pairs = tome.match(rows, r, class_token=class_token)
        rows, size = tome.merge(rows, size, pairs)
        owner = tome.carry(owner, pairs)
        assert rows.shape[1] == before - min(r, (before - class_token) // 2)
        for image in range(2):
            for token in range(rows.shape[1]):
                members = owner[image] == token
                assert size[image, token, 0] == members.sum() > 0
                assert torch.allclose(rows[image, token], x.features[image, members].double().mean(dim=0))
        if class_token:
            assert owner[:, 0].tolist() == [0, 0]
            assert size[:, 0, 0].tolist() == [1, 1]
    order = tome.raster(owner, rows.shape[1], prefix=int(class_token))
    for image in range(2):
        first = [min((owner[image] == token).nonzero()[:, 0].tolist()) for token in order[image].tolist()]
        assert first == sorted(first)
        assert len(first) == rows.shape[1] - class_token


def test_one_step_is_the_same_to_the_bit_whatever_is_around_it() -> None:
    from tests.fickle import Fickle

    x = inputs(3)
    size = torch.randint(1, 5, (3, 65, 1)).float()
    with Fickle():
        pairs = tome.match(x.keys, 20, class_token=True)
        rows, sizes = tome.merge(x.features, size, pairs)
        for image in range(3):
            one = tome.match(x.keys[image : image + 1], 20, class_token=True)
            alone, its = tome.merge(x.features[image : image + 1], size[image : image + 1], one)
            assert torch.equal(alone[0], rows[image])
            assert torch.equal(its[0], sizes[image])
    _, sizes = tome.merge(x.features, size, pairs)
    half, its = tome.merge(x.features.half(), size.half(), pairs)
    assert half.dtype == torch.float16
    assert its.dtype == torch.float32
    assert torch.equal(its, sizes)


def test_a_step_refuses() -> None:
    x = inputs()
    with pytest.raises(ValueError, match="r must be an int of at least 0"):
        tome.match(x.keys, -1)
    with pytest.raises(ValueError, match=r"metric must have shape \[B, t, d\]"):
        tome.match(x.row, 1)
    pairs = tome.match(x.keys, 5)
    with pytest.raises(ValueError, match="x must have shape"):
        tome.merge(x.features[:, 1:], torch.ones(3, 65, 1), pairs)
    with pytest.raises(ValueError, match="size must have shape"):
        tome.merge(x.features, torch.ones(3, 65), pairs)
    with pytest.raises(TypeError, match="owner must be int64"):
        tome.carry(torch.ones(3, 65), pairs)
    with pytest.raises(TypeError, match="owner must be int64"):
        tome.raster(torch.ones(3, 65), 60)


def test_tome_post_halves_and_keeps_places() -> None:
    x = double(0, 2)
    patches = x.features[:, 1:]
    for keep in (1, 3, 31, 32, 50, 64):
        found = methods.tome_post(patches, keep)
        assert (found.slots.diff(dim=1) > 0).all()
        for image in range(2):
            for row in range(keep):
                members = (found.owner[image] == row).nonzero()[:, 0]
                assert found.slots[image, row] in members
                assert torch.allclose(found.rows[image, row], patches[image, members].mean(dim=0))
    first = methods.tome_post(patches, 40).slots
    assert ((first.diff(dim=1) - 1) >= 0).all()
    assert all(token in row for row in first.tolist() for token in range(1, 64, 2))  # odd ones receive


# ------------------------------------------------------------------------------------------------ GlobalCom2


def test_globalcom2_of_an_even_picture() -> None:
    flat = torch.ones(16)
    found = methods.globalcom2(flat, torch.ones(2, 16), 0.5, shape=(1, 2), size=(10, 20))
    assert found.thumbnail.tolist() == list(range(8))
    assert torch.allclose(found.shares, torch.tensor([0.5, 0.5]))
    assert found.tile.tolist() == [0] * 4 + [1] * 4 + [-1] + [0] * 4 + [1] * 4 + [-1, -1, -1]
    assert found.place.tolist() == [*range(4), *range(4), -1, *range(4, 8), *range(4, 8), -1, -1, -1]


def test_globalcom2_never_keeps_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    thumbnail, tiles = torch.randn(64, generator=generator), torch.randn(4, 64, generator=generator)
    for size, rows, columns in (((100, 200), range(4, 12), range(16)), ((300, 100), range(16), range(5, 11))):
        found = methods.globalcom2(thumbnail, tiles, 0.9, shape=(2, 2), size=size)
        real = found.tile >= 0
        tile, place = found.tile[real], found.place[real]
        y, x = tile // 2 * 8 + place // 8, tile % 2 * 8 + place % 8
        assert set(y.tolist()) <= set(rows)
        assert set(x.tolist()) <= set(columns)
        assert ((y * 16 + x).diff() > 0).all()
        assert int((~real).sum()) == 16


def test_globalcom2_refuses() -> None:
    thumbnail, tiles = torch.randn(16), torch.randn(4, 16)
    for wrong, message in (
        ({"thumbnail": torch.randn(15)}, "thumbnail must be of a square"),
        ({"tiles": tiles[:3]}, "tiles must have shape"),
        ({"ratio": 1.5}, "ratio must be from 0 to 1"),
        ({"size": (0, 9)}, "size must be the picture's height and width"),
        ({"tiles": tiles / 0}, "NaN or Inf"),
    ):
        given = {"thumbnail": thumbnail, "tiles": tiles, "ratio": 0.5, "size": (9, 9), **wrong}
        with pytest.raises(ValueError, match=message):
            methods.globalcom2(shape=(2, 2), **given)  # type: ignore[arg-type]
