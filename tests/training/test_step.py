"""What a step draws, and the loss it computes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from ocvtp import OCPruner, area_weighted_mse
from ocvtp.training.batches import Batch, HeldOutBatches, Part, TrainingBatches, load
from ocvtp.training.recipe import Recipe
from ocvtp.training.step import distinct_picks, draw, hidden_tokens, live_slots, step_loss
from tests.training.fake import RECIPE, Fake, small_config


def visible(recipe: Recipe, tokens: int, batch: int = 2000) -> torch.Tensor:
    hidden = hidden_tokens(recipe, batch, tokens, torch.Generator().manual_seed(0))
    assert hidden.shape == (batch, tokens)
    return (~hidden).sum(dim=1)


class TestMask:
    @pytest.mark.parametrize("tokens", [256, 576, 2880])
    def test_its_size_follows_the_number_of_tokens(self, tokens: int) -> None:
        counts = visible(Recipe(any_visible=0.0), tokens, batch=3)
        assert counts.tolist() == [int(0.1 * tokens) - 1] * 3

    def test_at_256_tokens_it_is_the_published_one(self) -> None:
        assert visible(Recipe(any_visible=0.0), 256, batch=1) == visible(
            Recipe(any_visible=0.0, official_visible=True), 256, batch=1
        )

    @pytest.mark.parametrize("tokens", [30, 576])
    def test_the_published_hard_wired_number(self, tokens: int) -> None:
        assert visible(Recipe(any_visible=0.0, official_visible=True), tokens, batch=2).tolist() == [24, 24]

    def test_half_of_the_images_show_any_number_but_all(self) -> None:
        counts = visible(Recipe(), 20)
        fixed = (counts == 1).float().mean()
        assert 0.45 < fixed < 0.6  # half of them, and a twentieth of the other half
        assert counts.max() == 19
        assert counts.min() == 0
        assert set(counts.tolist()) == set(range(20))

    @pytest.mark.parametrize("tokens", [1, 2, 9])
    def test_something_is_always_hidden(self, tokens: int) -> None:
        for recipe in (Recipe(), Recipe(visible=1.0), Recipe(official_visible=True, any_visible=0.0)):
            assert visible(recipe, tokens, batch=200).max() < tokens

    def test_every_token_is_as_likely(self) -> None:
        hidden = hidden_tokens(
            Recipe(any_visible=0.0, visible=0.5), 4000, 10, torch.Generator().manual_seed(0)
        )
        share = (~hidden).float().mean(dim=0)  # 4 of 10
        assert (share - 0.4).abs().max() < 0.04


class TestDraw:
    def test_depends_on_its_arguments_alone(self) -> None:
        torch.manual_seed(1)
        one = draw(RECIPE, 4, 12, 16, "train", 7)
        torch.manual_seed(2)
        same, other = draw(RECIPE, 4, 12, 16, "train", 7), draw(RECIPE, 4, 12, 16, "train", 8)
        assert torch.equal(one.noise, same.noise)
        assert torch.equal(one.hidden, same.hidden)
        assert one.noise.shape != other.noise.shape or not torch.equal(one.noise, other.noise)

    def test_leaves_the_global_generator_alone(self) -> None:
        torch.manual_seed(3)
        want = torch.rand(3)
        torch.manual_seed(3)
        draw(RECIPE, 4, 12, 16, "train", 0)
        assert torch.equal(torch.rand(3), want)

    def test_every_number_of_slots_comes_up(self) -> None:
        counts = {draw(RECIPE, 1, 12, 4, "train", step).noise.shape[1] for step in range(40)}
        assert counts == set(RECIPE.slots)

    def test_never_more_slots_than_tokens(self) -> None:
        assert {draw(RECIPE, 1, 4, 4, "train", i).noise.shape[1] for i in range(40)} == {2, 4}
        with pytest.raises(ValueError, match="1 tokens, fewer than any"):
            draw(RECIPE, 1, 1, 4, "train", 0)


def test_loss_is_the_reconstructions() -> None:
    source = Fake()
    torch.manual_seed(0)
    pruner = OCPruner(small_config(source)).eval()
    drawn = draw(RECIPE, 5, 12, pruner.config.slot_dim, "train", 0)
    x = source.batch(range(5)).float()
    out = pruner.reconstruct(x, drawn.noise.shape[1], noise=drawn.noise, mask=drawn.hidden)
    want = area_weighted_mse(out.reconstruction, x, out.slot_attention, reduction="none")
    assert torch.equal(step_loss(pruner, x, drawn, RECIPE), want)
    alike = Recipe(slots=RECIPE.slots, power=0.0, empty_slots="official")
    plain = step_loss(pruner, x, drawn, alike)
    assert torch.allclose(plain, (out.reconstruction - x).square().mean(dim=(1, 2)), rtol=1e-4)


def test_truncation_is_the_recipes() -> None:
    source = Fake()
    torch.manual_seed(0)
    pruner = OCPruner(small_config(source)).eval()
    drawn = draw(RECIPE, 4, 12, pruner.config.slot_dim, "train", 0)
    gradients = []
    for truncate in (True, False):
        pruner.zero_grad()
        recipe = Recipe(slots=RECIPE.slots, truncate=truncate)
        step_loss(pruner, source.batch(range(4)).float(), drawn, recipe).mean().backward()
        gradients.append(pruner.slot_attention.query.weight.grad.clone())
    assert not torch.allclose(*gradients, rtol=1e-2)


def test_live_slots_and_distinct_picks_by_hand() -> None:
    attention = torch.tensor([[[0.6, 0.5, 0.1], [0.3, 0.4, 0.2], [0.1, 0.1, 0.7]]])
    assert live_slots(attention).tolist() == pytest.approx([2 / 3])  # the second slot leads nowhere
    attention = torch.tensor([[[0.6, 0.2], [0.4, 0.3]], [[0.6, 0.2], [0.4, 0.8]]])
    assert distinct_picks(attention).tolist() == [0.5, 1.0]


def part(rank: int, processes: int) -> Part:
    return lambda size: (size * rank // processes, size * (rank + 1) // processes)


class TestBatches:
    def steps(self, rank: int = 0, processes: int = 1) -> TrainingBatches:
        return TrainingBatches(Fake(), range(3, 33), RECIPE, 16, part(rank, processes))

    def held_out(self, records: int, rank: int = 0, processes: int = 1) -> list[Batch]:
        batches = HeldOutBatches(Fake(), range(records), RECIPE, 16, part(rank, processes))
        return [batches[number] for number in range(len(batches))]

    def test_an_epoch_sees_every_record_once_at_most(self) -> None:
        steps = self.steps()
        assert (steps.per_epoch, len(steps)) == (7, 21)
        seen = torch.cat([steps[i].features for i in range(7)]).flatten(1)
        assert len(torch.unique(seen, dim=0)) == 28

    def test_epochs_have_their_own_order(self) -> None:
        steps = self.steps()
        assert not torch.equal(steps[0].features, steps[7].features)

    def test_parts_add_up(self) -> None:
        whole, first, second = self.steps()[5], self.steps(0, 2)[5], self.steps(1, 2)[5]
        for all_of_it, *halves in zip(whole[:3], first[:3], second[:3], strict=True):
            assert torch.equal(torch.cat(halves), all_of_it)

    def test_any_step_can_be_the_first(self) -> None:
        forward, fresh = self.steps(), self.steps()
        kept = [forward[i] for i in range(10)][9]
        assert torch.equal(fresh[9].features, kept.features)
        assert torch.equal(fresh[9].noise, kept.noise)

    @pytest.mark.parametrize("processes", [1, 2, 3, 5])
    def test_held_out_parts_cover_every_record_once(self, processes: int) -> None:
        parts = [batch for rank in range(processes) for batch in self.held_out(9, rank, processes)]
        rows = torch.cat([batch.features for batch in parts]).flatten(1)
        assert len(rows) == 9
        assert torch.equal(torch.unique(rows, dim=0), torch.unique(Fake().x[:9].flatten(1), dim=0))

    @pytest.mark.parametrize("records", [3, 4, 9, 13, 40])
    def test_held_out_batches_have_every_number_of_slots(self, records: int) -> None:
        batches = self.held_out(records)
        assert {batch.noise.shape[1] for batch in batches} == set(RECIPE.slots)
        assert max(len(batch.features) for batch in batches) <= RECIPE.batch_size

    def test_held_out_draws_are_always_the_same(self) -> None:
        for one, again in zip(self.held_out(9), self.held_out(9), strict=True):
            assert torch.equal(one.noise, again.noise)
            assert torch.equal(one.hidden, again.hidden)

    def test_errors_are_handed_on(self) -> None:
        class Broken(Fake):
            def batch(self, indices: Sequence[int]) -> torch.Tensor:
                raise OSError("gone")

        batch = TrainingBatches(Broken(), range(3, 33), RECIPE, 16)[0]
        assert batch.error == "OSError: gone"
        assert batch.features.shape == (4, 12, 16)
        assert not batch.features.any()

    def test_features_that_are_not_finite(self) -> None:
        source = Fake()
        source.x[:] = torch.nan
        assert "hold NaN or Inf" in TrainingBatches(source, range(3, 33), RECIPE, 16)[0].error

    def test_workers_change_nothing(self) -> None:
        alone = list(load(self.steps(), range(15, 21), workers=0, pinned=False))
        helped = list(load(self.steps(), range(15, 21), workers=2, pinned=False))
        assert len(alone) == len(helped) == 6
        for one, other in zip(alone, helped, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
