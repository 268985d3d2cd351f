"""The folded inference path against the plain reference, and the reference's own properties."""

from __future__ import annotations

import pytest
import torch

from ocvtp_kernels.slot_attention import (
    FoldedWeights,
    SlotAttentionWeights,
    TopTokens,
    fold,
    slot_assignment,
    slot_attention,
    start_from_slots,
    top_tokens,
)
from ocvtp_kernels.slot_attention import folded as slot_attention_folded
from tests.conftest import make_pruner, relative_error

WIDTH, SLOT_WIDTH = 48, 32


def double_weights(seed: int = 0) -> SlotAttentionWeights:
    return SlotAttentionWeights(*(t.detach().double() for t in make_pruner(seed=seed).weights()))


def clustered(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Features with structure, an offset, and one channel forty times the others, as CLIP has."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(9, WIDTH, generator=generator, dtype=torch.float64)
    x = 0.6 * torch.randn(batch, tokens, WIDTH, generator=generator, dtype=torch.float64) + 0.3
    x = x + centres[torch.randint(9, (batch, tokens), generator=generator)]
    x[..., 7] += 40
    return x


def both(
    x: torch.Tensor, slots: torch.Tensor, w: SlotAttentionWeights, num_iters: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the plain path in the weights' dtype, and of the folded path in the features' dtype."""
    _, plain = slot_attention(x.double(), slots.double(), w, num_iters=num_iters)
    folded: FoldedWeights = fold(w, x.dtype)
    start = start_from_slots(slots.to(x.dtype), folded)
    return plain, slot_assignment(x, start, folded, num_iters=num_iters)


@pytest.mark.parametrize("num_iters", [1, 2, 3, 5])
@pytest.mark.parametrize(("batch", "tokens", "slots"), [(1, 49, 1), (2, 144, 16), (5, 577, 65), (3, 30, 64)])
def test_folding_is_exact(batch: int, tokens: int, slots: int, num_iters: int) -> None:
    x = clustered(batch, tokens)
    initial = torch.randn(batch, slots, SLOT_WIDTH, dtype=torch.float64)
    plain, folded = both(x, initial, double_weights(), num_iters)
    assert relative_error(folded, plain) <= 1e-11
    if slots > 1:  # with one slot every attention is 1 and the top token is a tie
        assert torch.equal(folded.argmax(dim=2), plain.argmax(dim=2))


def test_single_precision_error_is_that_of_the_plain_path() -> None:
    w, x = double_weights(), clustered(4, 576)
    initial = torch.randn(1, 64, SLOT_WIDTH, dtype=torch.float64)
    exact, folded = both(x.float(), initial, w)
    single = SlotAttentionWeights(*(t.float() for t in w))
    _, plain = slot_attention(x.float(), initial.float(), single)
    assert relative_error(folded, exact) <= 1e-5
    assert relative_error(folded, exact) <= 2 * relative_error(plain, exact) + 1e-6


def test_starved_slots() -> None:
    """Slots that own almost nothing: where mass / (mass + eps) matters."""
    w, x = double_weights(3), clustered(1, 40)
    initial = torch.randn(1, 300, SLOT_WIDTH, dtype=torch.float64)
    initial[:, ::2] *= 8
    _, attention = slot_attention(x, initial, w, num_iters=1)
    assert attention.sum(dim=2).min() < 1e-3
    plain, folded = both(x, initial, w)
    assert relative_error(folded, plain) <= 1e-11


@pytest.mark.parametrize("dropped", ["gru_mass_bias", "query_bias_weight"])
def test_the_small_folded_terms_matter(dropped: str) -> None:
    """The slot's logit bias and the mass term look negligible; without them the result is visibly wrong."""
    w, x = double_weights(), clustered(2, 100)
    initial = torch.randn(1, 16, SLOT_WIDTH, dtype=torch.float64)
    plain, _ = both(x, initial, w)
    folded = fold(w, torch.float64)
    wrong = folded._replace(**{dropped: torch.zeros_like(getattr(folded, dropped))})
    got = slot_assignment(x, start_from_slots(initial, wrong), wrong)
    assert relative_error(got, plain) > 1e-3


def test_the_slot_norms_bias_cancels() -> None:
    """It adds the same number to all slots' logits of a token, so folding may leave it out."""
    w, x = double_weights(), clustered(2, 100)
    initial = torch.randn(1, 16, SLOT_WIDTH, dtype=torch.float64)
    _, attention = slot_attention(x, initial, w)
    _, moved = slot_attention(
        x, initial, w._replace(slot_norm_bias=w.slot_norm_bias + torch.randn(SLOT_WIDTH))
    )
    assert relative_error(moved, attention) <= 1e-12


def test_attention_is_a_distribution_over_slots() -> None:
    plain, folded = both(
        clustered(2, 50), torch.randn(1, 7, SLOT_WIDTH, dtype=torch.float64), double_weights()
    )
    for attention in (plain, folded):
        assert torch.allclose(attention.sum(dim=1), torch.ones(2, 50, dtype=torch.float64))


def test_tokens_permute_with_their_input() -> None:
    x, initial = clustered(1, 60), torch.randn(1, 8, SLOT_WIDTH, dtype=torch.float64)
    order = torch.randperm(60)
    _, folded = both(x, initial, double_weights())
    _, permuted = both(x[:, order], initial, double_weights())
    assert relative_error(permuted, folded[:, :, order]) <= 1e-12


def test_top_tokens_of_a_map() -> None:
    """In every slot's key its highest attention and the lowest token that has it."""
    attention = torch.tensor([[[0.1, 0.7, 0.7], [0.9, 0.3, 0.3], [0.0, 0.0, 0.0]]])
    found = TopTokens(*slot_attention_folded.top_tokens(attention))
    highest = torch.tensor([0.7, 0.9, 0.0]).view(torch.int32).long()
    assert torch.equal(found.keys, (highest << 32 | 0x7FFFFFFF - torch.tensor([1, 0, 0]))[None, None])
    assert torch.equal(found.largest, torch.tensor([[0.9, 0.7, 0.7]]))
    assert found.finite.all()
    attention[0, 1, 2] = torch.nan
    assert torch.equal(slot_attention_folded.top_tokens(attention)[2], torch.tensor([[True, True, False]]))


def test_top_tokens_of_a_float64_map() -> None:
    """Two tokens that only float64 tells apart; keys hold float32."""
    attention = torch.tensor([[[0.5, 0.5 + 1e-12, 0.5]]], dtype=torch.float64)
    keys, largest, finite = slot_attention_folded.top_tokens(attention)
    assert 0x7FFFFFFF - (keys & 0x7FFFFFFF) == 1
    assert keys >> 32 == torch.tensor(0.5).view(torch.int32)
    assert (keys.dtype, largest.dtype, finite.dtype) == (torch.int64, torch.float32, torch.bool)
    assert torch.equal(largest, torch.full((1, 3), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_top_tokens_are_those_of_the_assignment(dtype: torch.dtype) -> None:
    weights = fold(double_weights(), dtype)
    start = start_from_slots(torch.randn(1, 9, SLOT_WIDTH, dtype=torch.float64), weights)
    x = clustered(3, 50).to(dtype)
    attention = slot_assignment(x, start, weights)
    keys, largest, finite = top_tokens(x, start, weights)
    assert torch.equal(0x7FFFFFFF - (keys[:, 0] & 0x7FFFFFFF), attention.argmax(dim=2))
    assert torch.equal(largest, attention.amax(dim=1).float())
    assert finite.all()


def test_weights_too_large_for_float16_are_refused() -> None:
    """Only for it, and also where folding makes them too large."""
    w = double_weights()
    for large in (
        w._replace(encoder_fc2_weight=w.encoder_fc2_weight * 1e6),
        w._replace(query_weight=w.query_weight * 1e3, key_weight=w.key_weight * 1e3),
    ):
        with pytest.raises(ValueError, match='too large for float16; use precision="fp32"'):
            fold(large, torch.float16)
        assert all(t.isfinite().all() for t in fold(large))
    vectors = fold(w._replace(encoder_fc1_bias=w.encoder_fc1_bias * 1e6), torch.float16)
    assert {t.dtype for t in vectors if t.ndim == 1} == {torch.float32}
    assert {t.dtype for t in vectors if t.ndim == 2} == {torch.float16}


def test_truncated_gradients_are_those_of_the_last_iteration() -> None:
    w, x = double_weights(), clustered(2, 12)
    initial = torch.randn(2, 4, SLOT_WIDTH, dtype=torch.float64, requires_grad=True)
    slots, _ = slot_attention(x, initial, w, num_iters=3)
    slots.square().sum().backward()
    with torch.no_grad():
        before_last, _ = slot_attention(x, initial, w, num_iters=2)
    entering = before_last.requires_grad_()
    last, _ = slot_attention(x, entering, w, num_iters=1, truncate=False)
    last.square().sum().backward()
    assert relative_error(initial.grad, entering.grad) <= 1e-12


def test_full_gradients() -> None:
    w = double_weights()
    x = clustered(1, 6)[:, :, :WIDTH]
    initial = torch.randn(1, 3, SLOT_WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s: slot_attention(x, s, w, num_iters=2, truncate=False), initial, fast_mode=True
    )


@pytest.mark.parametrize(
    ("features", "slots", "options", "message"),
    [
        (torch.rand(1, 9, WIDTH + 1), torch.rand(1, 4, SLOT_WIDTH), {}, "features must have shape"),
        (torch.rand(9, WIDTH), torch.rand(1, 4, SLOT_WIDTH), {}, "features must have shape"),
        (torch.rand(1, 9, WIDTH), torch.rand(1, 4, 5), {}, "slots must have shape"),
        (torch.rand(3, 9, WIDTH), torch.rand(2, 4, SLOT_WIDTH), {}, "batch size 1 or 3"),
        (torch.rand(1, 9, WIDTH), torch.rand(1, 4, SLOT_WIDTH), {"num_iters": 0}, "num_iters"),
    ],
)
def test_bad_arguments(features: torch.Tensor, slots: torch.Tensor, options: dict, message: str) -> None:
    w = SlotAttentionWeights(*(t.float() for t in double_weights()))
    with pytest.raises(ValueError, match=message):
        slot_attention(features, slots, w, **options)
