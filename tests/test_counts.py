"""Whole numbers and shares of other libraries, wherever an argument is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import ocvtp
from ocvtp.pruner.config import PrunerConfig
from ocvtp.training.recipe import Recipe
from ocvtp.vlm.contracts.budgets import Budget
from ocvtp_kernels.coverage import refine
from ocvtp_kernels.selection import select_tokens
from ocvtp_kernels.slot_attention import slot_attention
from tests.conftest import make_pruner

FEATURES = torch.randn(2, 20, 48, generator=torch.Generator().manual_seed(0))
MAP = torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(1))
PRUNER = make_pruner()
#: calls of a whole number, 3
COUNTS: dict[str, Callable[[Any], Any]] = {
    "pruner's keep": lambda n: PRUNER(FEATURES, n).indices,
    "pruner's slots, seed, rounds": lambda n: PRUNER(FEATURES, 8, num_slots=n, seed=n, refine=n).indices,
    "pruner's budgets": lambda n: (
        PRUNER(FEATURES, "auto", max_error=n, budgets=[n, 5], coverage=True).indices
    ),
    "slots": lambda n: PRUNER.slots(FEATURES, n, seed=n)[0],
    "random_tokens": lambda n: ocvtp.methods.random_tokens(FEATURES, n, seed=n).indices,
    "grid": lambda n: ocvtp.methods.grid(FEATURES, n, shape=(4, 5)).indices,
    "attention_top_k": lambda n: ocvtp.methods.attention_top_k(MAP[:, 0], n).indices,
    "k_medoids": lambda n: ocvtp.methods.k_medoids(FEATURES, n, rounds=n).indices,
    "greedy_dpp": lambda n: ocvtp.methods.greedy_dpp(FEATURES, n).indices,
    "select_tokens": lambda n: select_tokens(MAP, n)[0],
    "refine": lambda n: refine(FEATURES, torch.tensor([[0, 1], [2, 3]]), n),
    "slot_attention": lambda n: slot_attention(FEATURES, torch.ones(1, 3, 32), PRUNER.weights(), num_iters=n)[
        0
    ],
}
THREES = [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)]


@pytest.mark.parametrize("three", THREES, ids=lambda three: type(three).__name__)
@pytest.mark.parametrize("name", COUNTS)
def test_whole_numbers(name: str, three: Any) -> None:
    assert torch.equal(COUNTS[name](three), COUNTS[name](3))


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), "3", None, np.array([3])])
@pytest.mark.parametrize("name", [name for name in COUNTS if "pruner" not in name and "slots" not in name])
def test_what_is_none(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="int"):
        COUNTS[name](value)


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), None, np.array([3])])
def test_what_is_no_budget(value: Any) -> None:
    with pytest.raises(TypeError, match="keep must be an int"):
        PRUNER(FEATURES, value)
    with pytest.raises(ValueError, match="ascending ints"):
        PRUNER(FEATURES, "auto", max_error=1, budgets=[value, 8])


@pytest.mark.parametrize("share", [np.float32(0.25), np.float16(0.25), np.float64(0.25)])
def test_shares(share: Any) -> None:
    assert PRUNER(FEATURES, share).indices.shape == (2, 5)
    assert Budget(share) == Budget(0.25)
    assert Budget(share).of(20) == 5
    with pytest.raises(ValueError, match="share"):
        PRUNER(FEATURES, np.float32(1.5))


def test_budgets_of_a_model() -> None:
    assert Budget(np.int64(8)) == Budget(8)
    assert type(Budget(np.int64(8)).of(5)) is int
    own = Budget("auto", np.float32(0.5), [np.int64(4), 8])
    assert own == Budget("auto", 0.5, (4, 8))
    with pytest.raises(ValueError, match="ascending ints"):
        Budget("auto", 0.5, [np.int64(8), 4])


def test_what_is_written_to_files_is_plain() -> None:
    config = PrunerConfig(in_dim=np.int64(48), layer=np.uint8(1), eps=np.float32(1e-5))
    assert json.loads(json.dumps(config.to_dict()))["in_dim"] == 48
    recipe = Recipe(epochs=np.int64(2), slots=np.array([4, 8]), clip=np.float32(0.5), seed=np.int32(3))
    assert json.loads(json.dumps(recipe.to_dict()))["slots"] == [4, 8]
    assert recipe == Recipe(epochs=2, slots=(4, 8), clip=0.5, seed=3)
