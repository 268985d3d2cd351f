"""Flags of images that arrive late: who raises what, when, and how much is kept meanwhile."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ocvtp import watch as module
from ocvtp.checks import check_finite
from ocvtp.watch import Watch, check_on_invalid, on_host, watched, watching
from tests.far import FarLine

GOOD, BAD = torch.tensor([3, 0, 5]), torch.tensor([3, -1, -1])


def test_nobody_waits_and_a_later_call_raises(far: FarLine) -> None:
    watch = Watch()
    watch.start()
    watch.note(GOOD, "first")
    watch.note(BAD, "second")
    watch.start()  # still under way
    far.arrive()
    with pytest.raises(ValueError, match=r"^in an earlier call, images \[1, 2\] of 3: second$"):
        watch.start()
    watch.start()  # said once
    assert far.waits == 0


def test_after_somebody_waited_the_call_itself_raises(far: FarLine) -> None:
    watch = Watch()
    watch.start()
    watch.note(torch.tensor([True, False]), "x")
    far.arrive()
    with pytest.raises(ValueError, match=r"^in this call, image \[1\] of 2: x$"):
        watch.look()


def test_asking_waits(far: FarLine) -> None:
    watch = Watch()
    watch.note(torch.tensor([-1]), "x")
    watch.look()
    with pytest.raises(ValueError, match="in this call, an image: x"):
        watch.check()
    assert far.waits == 1
    watch.check()


def test_all_that_was_wrong_is_said(far: FarLine) -> None:
    watch = Watch()
    for message in ("a", "b", "a"):
        watch.note(BAD, message)
    watch.note(-torch.ones(20, dtype=torch.int64), "c")
    far.arrive()
    with pytest.raises(
        ValueError, match=r"of 3: a; .* of 3: b; .*\[0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\] of 20: c$"
    ):
        watch.look()


def test_a_grid_is_warned_of_once(far: FarLine, caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch()
    with caplog.at_level(logging.WARNING, logger="ocvtp"):
        for _ in range(3):
            watch.note(BAD, "x", "grid")
            assert not caplog.records or far.arrived
            far.arrive()
            watch.look()
    assert len(caplog.records) == 1
    assert "in this call, images [1, 2] of 3: tokens spread evenly are kept. x" in caplog.text


def test_what_is_on_the_host_is_looked_at_at_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = Watch()
    assert on_host(BAD)
    watch.note(GOOD, "x")
    with pytest.raises(ValueError, match=r"^images \[1, 2\] of 3: x$"):
        watch.note(BAD, "x")
    with caplog.at_level(logging.WARNING, logger="ocvtp"):
        watch.note(BAD, "x", "grid")
    assert "images [1, 2] of 3: tokens spread evenly" in caplog.text


def test_memory_is_bounded_and_used_again(far: FarLine) -> None:
    watch = Watch()
    for _ in range(3 * module.MOST_PENDING):
        watch.note(GOOD, "x")
    assert len(watch._pending) == module.MOST_PENDING
    far.arrive()
    watch.look()
    assert not watch._pending
    made = far.places
    for images in (1, 3, 64):
        watch.note(torch.zeros(images, dtype=torch.int64), "x")
    assert far.places == made
    watch.note(torch.zeros(65, dtype=torch.int64), "x")  # needs more room
    watch.note(torch.ones(3, dtype=torch.bool), "x")  # and another dtype
    assert far.places == made + 2
    assert len(watch._free) <= module.MOST_PENDING


def test_flags_that_are_used_again_are_the_new_ones(far: FarLine) -> None:
    watch = Watch()
    watch.note(torch.full((9,), -1), "x", "grid")
    far.arrive()
    watch.look()
    watch.note(GOOD, "y")
    far.arrive()
    watch.look()
    assert far.places == 1


def test_what_arrives_out_of_order(far: FarLine) -> None:
    """Of two streams, a later call's flags may be there first."""
    watch = Watch()
    watch.note(GOOD, "x")
    watch._pending[0].place.arrived._sent = 99  # on a slow stream
    watch.note(BAD, "y")
    far.arrive()
    with pytest.raises(ValueError, match="y"):
        watch.look()
    assert len(watch._pending) == 1


def test_threads_share_one(far: FarLine) -> None:
    """Every bad image is told of once, whoever tells."""
    watch, lock = Watch(), threading.Lock()
    noted: list[str] = []
    found: list[str] = []

    def call(number: int) -> None:
        for step in range(20):
            try:
                watch.start()
                watch.note(torch.tensor([0, -1 if step % 5 == 0 else 0]), f"<{number}.{step}")
                if step % 5 == 0:
                    noted.append(f"{number}.{step}")
                far.arrive()
                watch.look()
            except ValueError as error:
                with lock:
                    found.extend(part.split("<")[1] for part in str(error).split("; "))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(8)))
    far.arrive()
    try:
        watch.look()
    except ValueError as error:
        found.extend(part.split("<")[1] for part in str(error).split("; "))
    assert noted  # of what a call notes: one that raises an earlier one's error gets no further
    assert sorted(found) == sorted(noted)


def test_another_threads_call_is_an_earlier_one(far: FarLine) -> None:
    watch = Watch()
    watch.start()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: (watch.start(), watch.note(BAD, "x"))).result()
    far.arrive()
    with pytest.raises(ValueError, match="in an earlier call"):
        watch.look()


def test_what_is_recorded_or_traced_is_left_alone(far: FarLine) -> None:
    watch = Watch()
    far.capturing = True
    watch.note(BAD, "x")
    far.capturing = False
    assert far.sent == 0

    def traced(x: torch.Tensor) -> torch.Tensor:
        watch.note(x, "x")
        return x + 1

    for mode in ("real", "fake"):
        make_fx(traced, tracing_mode=mode)(BAD)
    torch._dynamo.reset()
    torch.compile(traced, fullgraph=True, backend="aot_eager")(BAD)
    watch.note(torch.empty(3, dtype=torch.int64, device="meta"), "x")
    watch.note(torch.empty(0, dtype=torch.int64), "x")
    assert far.sent == 0


def test_nobody_looks_while_somebody_records(far: FarLine) -> None:
    """A query of an event breaks a recording off."""
    watch = Watch()
    watch.note(BAD, "x")
    far.arrive()
    far.capturing = True
    watch.start()
    far.capturing = False
    with pytest.raises(ValueError, match="x"):
        watch.start()


def test_inference_mode_does_not_stick(far: FarLine) -> None:
    watch = Watch()
    with torch.inference_mode():
        watch.note(GOOD.clone(), "x")
        far.arrive()
        watch.look()
    watch.note(GOOD, "x")
    assert far.places == 1


def test_under_vmap(far: FarLine) -> None:
    watch = Watch()

    def call(x: torch.Tensor) -> torch.Tensor:
        watch.note(x, "x")
        return x

    torch.vmap(call)(torch.stack([GOOD, BAD]))
    far.arrive()
    with pytest.raises(ValueError, match=r"images \[4, 5\] of 6"):
        watch.look()


def test_copies_start_empty(far: FarLine) -> None:
    watch = Watch()
    watch.note(BAD, "x")
    far.arrive()
    for other in (copy.deepcopy(watch), pickle.loads(pickle.dumps(watch))):
        other.check()


def test_whose_call_it_is() -> None:
    assert watched() is None
    outer, inner = Watch(), Watch()
    with watching(outer):
        with contextlib.suppress(KeyError), watching(inner):
            assert watched() is inner
            raise KeyError
        assert watched() is outer
    assert watched() is None


def test_functions_that_nobody_calls_for(far: FarLine) -> None:
    """They have a watch for each thread; who calls them for somebody has them note there."""
    bad = torch.full((2, 3, 4), torch.nan)
    check_finite("x", bad)
    check_finite("y", bad[0, 0])
    far.arrive()
    with pytest.raises(
        ValueError, match=r"in an earlier call, images \[0, 1\] of 2: x contains NaN or Inf.*an image: y"
    ):
        check_finite("x", torch.zeros(3))
    with watching(watch := Watch()):
        check_finite("x", bad)
        check_finite("x", torch.zeros(3))
    far.arrive()
    check_finite("x", torch.zeros(3))
    with pytest.raises(ValueError, match="x contains NaN"):
        watch.look()


def test_no_assertion_for_a_gpu() -> None:
    """It would end the process's CUDA context: neither in what is traced for one, nor in what it compiles."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def graph(device: str) -> str:
        with FakeTensorMode():
            x = torch.empty(2, 3, device=device)

            def check(x: torch.Tensor) -> torch.Tensor:
                check_finite("x", x)
                return x + 1

            return str(make_fx(check)(x).graph)

    assert "_assert_async" in graph("cpu")  # there it is an ordinary error
    assert "_assert_async" not in graph("cuda")


@pytest.mark.parametrize("value", ["", "ignore", None, True])
def test_what_on_invalid_may_be(value: Any) -> None:
    with pytest.raises(ValueError, match='on_invalid must be "raise" or "grid"; got'):
        check_on_invalid(value)
