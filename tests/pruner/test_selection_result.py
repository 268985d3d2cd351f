"""Selection.gather: rows only of what was selected from."""

from __future__ import annotations

import pytest
import torch

from ocvtp import OCPruner, Selection
from tests.conftest import SMALL


def test_the_class_token_must_be_dropped(pruner: OCPruner) -> None:
    """Rows that still hold it have one token more: every index would be off by one, without a word."""
    x = torch.randn(2, 50, SMALL.in_dim)
    selection = pruner(x, keep=9)
    assert selection.tokens == 50
    assert selection.gather(x).shape == (2, 9, SMALL.in_dim)
    assert selection.gather(torch.randn(2, 50, 7)).shape == (2, 9, 7)  # any width: other layers, projected
    with_class_token = torch.cat([torch.zeros(2, 1, SMALL.in_dim), x], dim=1)
    with pytest.raises(
        ValueError, match=r"x must have shape .*no class token.*\[2, 50, any\].*\[2, 51, 48\]"
    ):
        selection.gather(with_class_token)


@pytest.mark.parametrize("shape", [(1, 50, 48), (3, 50, 48), (50, 48), (2, 49, 48)])
def test_other_shapes_are_refused_by_name(pruner: OCPruner, shape: tuple[int, ...]) -> None:
    selection = pruner(torch.randn(2, 50, SMALL.in_dim), keep=9)
    with pytest.raises(ValueError, match=r"^x must have shape"):
        selection.gather(torch.zeros(shape))


def test_a_selection_made_by_hand_may_leave_the_tokens_out() -> None:
    selection = Selection(torch.tensor([[0, 2]]), torch.tensor([2]))
    assert selection.tokens is None
    assert selection.gather(torch.arange(5.0)[None, :, None]).flatten().tolist() == [0, 2]
