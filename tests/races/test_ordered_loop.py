"""The slot loop in one launch: wherever two tasks meet at an address, its counters order them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ocvtp import PrunerConfig
from ocvtp_kernels import _tiles
from ocvtp_kernels._arch import interpreting
from ocvtp_kernels.slot_attention import loop
from ocvtp_kernels.slot_attention import triton as kernels
from ocvtp_kernels.slot_attention.cut import arithmetic
from ocvtp_kernels.slot_attention.folded import fold, start_from_slots
from tests.conftest import make_pruner
from tests.kernels.triton_device import DEVICE, randn
from tests.races import happens_before as hb
from tests.races.instrument import instrumented

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter")

ROW = ("slot_attention.slot_loop", "sm90", "K<=64-16bit")
TINY = {"BM": 16, "BK": 32, "BN": 16, "BD": 16, "BR": 16, "BJ": 16, "BO1": 16, "BO2": 16, "BOQ": 16}
DEPTH = {"BC": 32, "BCG": 32}


@pytest.fixture(autouse=True)
def many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each step several for every image, and row tiles with rows of two images."""
    monkeypatch.setitem(_tiles.table(), ROW, {**_tiles.tile(*ROW), **TINY, **DEPTH})


def checked(
    batch: int, tokens: int, slots: int, updates: int, *, per_image: bool = False, whole: bool = True
) -> hb.Checked:
    """Everything that is wrong with the loop of such a call; ``whole``: that all of its tasks were done."""
    pruner = make_pruner(PrunerConfig(in_dim=24, hidden_dim=40, slot_dim=40, ffn_dim=56))
    weights = fold(pruner.weights(), torch.float16)
    start = start_from_slots(randn(batch if per_image else 1, slots, 40, seed=3), weights)
    cut = arithmetic(DEVICE, torch.float16, False)
    x = randn(batch, tokens, 24, seed=1)
    counters = loop.counters(batch, slots, cut)
    z = kernels._encode(x, weights, cut, False, counters)
    tile = _tiles.tile(*ROW)
    tasks = sum(step.tasks for step in loop.phases(batch, tokens, slots, 40, 56, updates, tile))
    tickets = hb.Tickets(counters, tasks, ticket=counters.numel() - 1, left=None)
    tiles = -(-tokens // tile["BM"])
    found = kernels._room_for_results(batch, slots, tokens, cut, None)
    found = found._replace(keys=torch.empty(batch, tiles, slots, dtype=torch.int64))
    with instrumented(log=True, watch=tickets) as launches:
        loop.assign(z, start, weights, updates + 1, 1e-5, counters, found, cut)
    (launch,) = launches
    if whole:
        assert counters[-1] == tasks
        assert found.finite.all()
    return hb.analyse(launch, tickets)


@pytest.mark.parametrize(
    ("batch", "tokens", "slots", "updates", "per_image"),
    [(1, 37, 7, 2, False), (3, 20, 11, 2, False), (2, 33, 17, 1, True), (4, 17, 5, 3, False)],
)
def test_every_meeting_is_ordered(batch: int, tokens: int, slots: int, updates: int, per_image: bool) -> None:
    result = checked(batch, tokens, slots, updates, per_image=per_image)
    assert result.findings == []
    assert result.pairs > 100


def nothing(*_: Any, **__: Any) -> None:
    return None


@pytest.mark.parametrize(
    ("module", "name", "kinds"),
    [
        (loop, "_wait", {hb.UNORDERED, hb.EARLY}),
        (loop.tl, "debug_barrier", {hb.EARLY, hb.LATE}),
    ],
)
def test_what_is_left_out_is_found(
    module: Any, name: str, kinds: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, nothing)
    found = {finding.kind for finding in checked(2, 20, 11, 2).findings}
    assert found & kinds
    assert found <= kinds


def test_a_wait_for_one_tile_too_few_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = loop._wait
    monkeypatch.setattr(loop, "_wait", lambda counter, want: wait(counter, want - 1))
    kinds = {finding.kind for finding in checked(2, 20, 11, 2).findings}
    assert hb.UNORDERED in kinds
