"""Rows of methods that merge are differentiable in the features; their choices are constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ocvtp import methods
from ocvtp.methods import tome
from tests.methods import rivals
from tests.methods.rivals import Inputs, inputs

KEEP = 7

Rows = Callable[[Inputs], torch.Tensor]
#: Of features with the class token.
ROWS: dict[str, Rows] = {
    **{name: lambda x, merge=merge: merge(x, KEEP).rows for name, merge in rivals.MERGING.items()},
    "by_place": lambda x: rivals.MERGING["prumerge+"](x, KEEP).by_place().rows,
    "prumerge_published": lambda x: _published(x, ratio=0.3),
    "prumerge+_published": lambda x: _published(x, ratio=0.3, plus=True),
    "tome.merge": lambda x: _step(x)[0],
    "tome.merge of nothing": lambda x: tome.merge(x.features, _sizes(x), tome.match(x.keys, 0))[0],
}

each = pytest.mark.parametrize("name", ROWS)


def _published(x: Inputs, **options: Any) -> torch.Tensor:
    made = methods.prumerge_published(x.features[:, 1:], x.row, x.keys[:, 1:], neighbours=3, **options)
    return made.rows


def _sizes(x: Inputs) -> torch.Tensor:
    sizes = torch.arange(x.features.shape[1]) % 3 + 1
    return (
        sizes[None, :, None].expand(len(x.features), -1, -1).to(torch.promote_types(x.row.dtype, torch.float))
    )


def _step(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = tome.match(x.keys, 5, class_token=True)
    return tome.merge(x.features, _sizes(x).requires_grad_(), pairs)


def few(batch: int = 1) -> Inputs:
    """Little enough for numeric derivatives."""
    x = inputs(batch, tokens=15)
    return replace(x, features=x.features[:, :, :3])


def gradient(rows: Rows, x: Inputs) -> torch.Tensor:
    """Of the features, of a sum of the rows that weighs every entry differently."""
    leaf = x.features.clone().requires_grad_()
    made = rows(x.but(features=leaf))
    assert made.dtype == leaf.dtype
    draw = torch.Generator().manual_seed(9)
    weights = torch.randn(made.shape[1:], generator=draw).to(made.dtype)
    (made * weights).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@each
def test_derivatives_are_those_of_numbers(name: str) -> None:
    x = few().each(torch.Tensor.double)
    leaf = x.features.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda features: ROWS[name](x.but(features=features)), leaf, check_forward_ad=True
    )


@each
def test_everything_else_is_a_constant(name: str) -> None:
    x = few().each(lambda t: t.clone().requires_grad_())
    ROWS[name](x).square().sum().backward()
    assert {field for field, tensor in vars(x).items() if tensor.grad is not None} == {"features"}


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_a_gradient_of_its_own(name: str, dtype: torch.dtype) -> None:
    x = few().each(lambda t: t.to(dtype))
    found = gradient(ROWS[name], x)
    assert found.dtype == dtype
    want = gradient(ROWS[name], x.each(torch.Tensor.float))
    assert (found.float() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("name", [name for name in ROWS if name != "prumerge+_published"])
def test_the_batch_changes_no_bit_of_a_gradient(name: str) -> None:
    x = inputs(3)
    whole = gradient(ROWS[name], x)
    for image in range(3):
        assert torch.equal(gradient(ROWS[name], x.images([image]))[0], whole[image])


@each
def test_who_asks_for_no_gradient_gets_none(name: str) -> None:
    x = few().each(lambda t: t.clone().requires_grad_())
    assert not ROWS[name](x.but(features=x.features.detach())).requires_grad


def test_sizes_have_no_gradient() -> None:
    x = few()
    rows, sizes = _step(x.but(features=x.features.clone().requires_grad_()))
    assert rows.requires_grad
    assert not sizes.requires_grad


def test_every_token_gets_the_gradient_of_what_it_went_into() -> None:
    """By hand: the mean shares it out, whoever is kept or a target has all of it."""
    x = inputs()
    made = methods.trim(x.features[:, 1:], x.image_embeds, x.text, KEEP)
    found = gradient(
        lambda x: methods.trim(x.features[:, 1:], x.image_embeds, x.text, KEEP).rows.cumsum(1), x
    )
    upstream = gradient(lambda x: x.features, x.but(features=made.rows.cumsum(1)))
    upstream = upstream.flip(1).cumsum(1).flip(1)  # back through the sum of rows
    mean = (made.owner == KEEP - 1)[:, :, None]
    want = upstream.gather(1, made.owner[:, :, None].expand(-1, -1, 24))
    want = torch.where(mean, want / mean.sum(1, keepdim=True), want)
    torch.testing.assert_close(found[:, 1:], want)
    assert (found[:, 0] == 0).all()
