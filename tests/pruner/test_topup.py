"""Budgets topped up by farthest points: whose tokens stay, and what follows them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ocvtp import OCPruner, PrunerConfig
from ocvtp.pruner.topup import live_tokens
from tests.kernels.test_diversity import values


@pytest.fixture
def pruner() -> OCPruner:
    torch.manual_seed(3)
    return OCPruner(PrunerConfig(in_dim=16, hidden_dim=32, slot_dim=16, ffn_dim=24)).eval()


def by_hand(attention: torch.Tensor) -> set[int]:
    """Of one image ``[K, N]``: top tokens of slots that some token belongs to."""
    owners = set(attention.argmax(0).tolist())
    return {int(attention[slot].argmax()) for slot in owners}


def test_live_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    attention = (3 * torch.randn(6, 9, 20, generator=draw)).softmax(1)
    attention[1, 2:] *= 1e-9  # two slots own everything
    attention[2] = 1 / 9  # nobody is first: the lowest slot owns all, and names token 0
    found, count = live_tokens(attention, 9)
    for row, number, image in zip(found, count, attention, strict=True):
        kept = row[row >= 0].tolist()
        assert kept == sorted(by_hand(image))
        assert number == len(kept)
        assert (row[len(kept) :] == -1).all()
    assert count[1] <= 2
    assert found[2].tolist() == [0] + [-1] * 8


def test_a_dead_slot_does_not_silence_a_live_one_of_the_same_token() -> None:
    rows = [[0.6, 0.5, 0.5], [0.2, 0.1, 0.2], [0.2, 0.4, 0.3]]  # two slots name token 0, and one owns all
    attention = torch.tensor([rows])
    found, count = live_tokens(attention, 3)
    assert (found.tolist(), count.tolist()) == ([[0, -1, -1]], [1])


def test_what_follows_is_farthest_from_what_is_kept(pruner: OCPruner) -> None:
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(1))
    selection = pruner(x, 12, fill="farthest_point", return_attention=True)
    assert selection.slot_attention is not None
    for row, image, attention, count in zip(
        selection.indices, x, selection.slot_attention, selection.from_slots, strict=True
    ):
        own = by_hand(attention)
        assert count == len(own)
        assert own <= set(row.tolist())
        assert len(set(row.tolist())) == 12
        order = sorted(own)
        rest = set(row.tolist()) - own
        while rest:  # each is the farthest of all when its turn comes
            value = values("farthest_points", image, torch.tensor([*order, 0]))[-1]
            best = max(rest, key=lambda token: float(value[token]))
            assert value[best] >= value.max() * (1 - 1e-4)
            order.append(best)
            rest.remove(best)


def test_scores_are_not_read_and_the_batch_changes_no_bit(pruner: OCPruner) -> None:
    x = torch.randn(4, 40, 16, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"keep": 9, "fill": "farthest_point"}
    want = pruner(x, **options)
    scored = pruner(x, fill_scores=torch.rand(4, 40), **options)
    assert torch.equal(scored.indices, want.indices)
    rows = torch.randn(4, 40, 5)
    selection, taken = pruner.assign(x, **options).select_rows(None, rows)
    assert torch.equal(selection.indices, want.indices)
    assert torch.equal(taken, want.gather(rows))
    for i in range(4):
        assert torch.equal(pruner(x[i : i + 1], **options).indices[0], want.indices[i])
    assert not torch.equal(pruner(x, keep=9).indices, want.indices)
    auto = pruner(x, keep="auto", budgets=(4, 9), max_error=0.0, fill="farthest_point")
    assert torch.equal(auto.indices, want.indices)


def test_refinement_follows(pruner: OCPruner) -> None:
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(1))
    plain = pruner(x, 9, fill="farthest_point", coverage=True)
    moved = pruner(x, 9, fill="farthest_point", coverage=True, refine=3)
    assert plain.coverage is not None
    assert moved.coverage is not None
    assert (moved.coverage <= plain.coverage).all()
    assert torch.equal(plain.from_slots, moved.from_slots)


def test_kernels_fill_alike(pruner: OCPruner) -> None:
    pytest.importorskip("triton")
    from tests.kernels.triton_device import DEVICE

    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    want = pruner.to(DEVICE)(x, 9, fill="farthest_point", backend="torch")
    got = pruner(x, 9, fill="farthest_point", backend="triton", precision="fp32")
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.from_slots, want.from_slots)


def test_what_does_not_fit(pruner: OCPruner) -> None:
    x = torch.randn(1, 40, 16)
    with pytest.raises(ValueError, match='fill must be "attention" or "farthest_point"'):
        pruner(x, 9, fill="grid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="10 slots may name more than keep=9"):
        pruner(x, 9, num_slots=10, fill="farthest_point")
    assert pruner(x, 9, num_slots=5, fill="farthest_point").indices.shape == (1, 9)
