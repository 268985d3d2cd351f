"""All iterations in one launch: the launches' bits, whatever the sizes, and what it needs around it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ocvtp_kernels._launch import launch, recording
from ocvtp_kernels._tiles import trusting_bits
from ocvtp_kernels.slot_attention import TopTokens, loop, top_tokens
from ocvtp_kernels.slot_attention import triton as kernels
from tests.conftest import relative_error
from tests.kernels.test_slot_attention_triton import (
    ODD,
    SMALL,
    TINY,
    Problem,
    Widths,
    assert_same,
    emulated,
    exact,
    ignore_nan,
    problem,
)
from tests.kernels.triton_device import DEVICE, ON_GPU, bits, interpreter_only

HALF = torch.float16


def found(p: Problem, num_iters: int, *, images: int) -> TopTokens:
    """With the loop for up to so many images."""
    with loop.up_to(images):
        return top_tokens(*p.arguments(HALF), num_iters=num_iters, backend="triton")


@pytest.mark.parametrize(
    ("batch", "slots", "per_image", "tokens", "widths", "num_iters"),
    [
        (1, 1, False, 1, TINY, 2),
        (1, 5, False, 49, TINY, 4),
        (3, 17, True, 65, ODD, 3),  # row tiles with slots of two images, columns that end within a part
        (2, 64, False, 70, SMALL, 2),
        (4, 33, True, 130, TINY, 3),
    ],
)
def test_the_bits_of_the_launches(
    batch: int, slots: int, per_image: bool, tokens: int, widths: Widths, num_iters: int
) -> None:
    p = problem(batch, slots, tokens, widths, per_image=per_image)
    assert_same(found(p, num_iters, images=4), found(p, num_iters, images=0))


def test_accuracy() -> None:
    """Of each token's largest attention, against float64; narrow tiles too."""
    p = problem(2, 16, 49)
    want, rounded = (each.amax(dim=1) for each in (exact(p), emulated(p)))
    allowed = 2 * relative_error(rounded, want)
    with trusting_bits():
        narrow = found(p, 3, images=4)
    for got in (found(p, 3, images=4), narrow):
        assert relative_error(got.largest, want) <= allowed
        assert got.finite.all()


@ignore_nan
@interpreter_only
def test_what_is_not_finite_stays_in_its_image() -> None:
    p = problem(3, 5, 20, TINY)
    clean = found(p, 3, images=4)
    p.features[1, 3, 2] = torch.nan
    got = found(p, 3, images=4)
    assert got.finite.all(dim=1).tolist() == [True, False, True]
    for one, other in zip(got, clean, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])


def test_who_is_served() -> None:
    """Few images, few slots, an update at all, float16; nobody who wants the map."""
    cases = {
        (1, 5, 3): True,
        (4, 64, 2): True,
        (5, 5, 3): False,
        (1, 65, 3): False,
        (1, 5, 1): False,
    }
    for (batch, slots, num_iters), served in cases.items():
        p = problem(batch, slots, 9, TINY)
        for dtype in (torch.float32, HALF):
            for whole_map in (False, True):
                with recording() as launches:
                    kernels.assign(*p.arguments(dtype), num_iters, 1e-5, False, whole_map)
                looped = launches[-1].kernel.fn.__name__ == "slot_loop"
                assert looped == (served and dtype == HALF and not whole_map)


@interpreter_only
def test_counters_that_are_not_zero_don_t_hang() -> None:
    """What they are after a launch: whoever repeats that launch alone gets nothing done, and ends."""
    p = problem(1, 5, 20, TINY)
    with recording() as launches:
        kernels.assign(*p.arguments(HALF), 3, 1e-5, False, False)
    for each in launches:
        launch(each.kernel, each.grid, DEVICE, *each.arguments, **each.tile)
    last = launches[-1]
    tensors = [argument for argument in last.arguments if isinstance(argument, torch.Tensor)]
    before = [tensor.clone() for tensor in tensors[:-1]]
    launch(last.kernel, last.grid, DEVICE, *last.arguments, **last.tile)
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(before, tensors, strict=False))


def test_tasks_and_programs_are_as_many() -> None:
    p = problem(3, 50, 130, (24, 20, 48, 72))
    with recording() as launches:
        kernels.assign(*p.arguments(HALF), 3, 1e-5, False, False)
    last = launches[-1]
    assert last.grid == (sum(phase.tasks for phase in last.phases),)
    assert [phase.name for phase in last.phases] == [
        *["attend", "update", "gru", "mlp-1", "mlp-2", "queries"] * 2,
        "attend",
    ]


@pytest.mark.skipif(not ON_GPU, reason="the interpreter runs one program after the other")
def test_again_and_again() -> None:
    """Programs that wait for each other, with their counters set to zero anew each time."""
    p = problem(1, 64, 576, SMALL)
    want = found(p, 3, images=4)
    for _ in range(200):
        assert_same(found(p, 3, images=4), want)
