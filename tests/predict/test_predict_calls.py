"""What is predicted is what the product does: its own launchers and modules, on meta."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bench.predict.__main__ import main
from bench.predict.calls import IMAGE_TOKENS, Size, captured, exposed, sections
from bench.predict.steps import Operator, Step, Steps, steps_of
from bench.predict.targets import SECTIONS
from ocvtp_kernels import _launch
from ocvtp_kernels._arch import interpreting

SMALL = Size(1, IMAGE_TOKENS, 64)


def kernels(steps: list[Step]) -> list[str]:
    return [step.kernel.fn.__name__ for step in steps if isinstance(step, _launch.Launch)]


def operators(steps: list[Step]) -> list[str]:
    return [step.name for step in steps if isinstance(step, Operator)]


def test_every_section_does_something() -> None:
    found = dict(sections(SMALL))
    assert set(found) == set(SECTIONS)
    assert all(kernels(steps) for steps in found.values())
    # What is replayed is the slots and, beside them, what is copied.
    slots = kernels(found["slots"])
    assert [name for name in kernels(found["captured"]) if name in set(slots)] == slots
    assert operators(found["captured"])
    assert set(found) - {"exposed"} == set(dict(sections(Size(1, 2880, 160))))


def test_a_replay_is_what_was_recorded() -> None:
    assert str(captured(SMALL)) == str(captured(SMALL))


def test_what_is_exposed_selects() -> None:
    """The tower's own layers are not in it: no product of theirs, which has 4096 columns."""
    steps = exposed(2)
    assert any("select" in name or "gather" in name for name in kernels(steps))
    largest = max((step.flops for step in steps if isinstance(step, Operator)), default=0)
    assert largest < 2 * 2 * (IMAGE_TOKENS + 1) * 1024 * 4096


def test_steps_are_in_their_order() -> None:
    x = torch.empty(2, 3, 8, device="meta")
    weight = torch.empty(5, 8, device="meta")

    def call(noted: Steps) -> None:
        product = x @ weight.mT
        noted.mark("here")
        product.view(6, 5).expand(6, 5).add_(1)

    first, mark, last = steps_of(call)
    assert isinstance(first, Operator)
    assert (first.flops, first.outputs) == (2 * 6 * 8 * 5, 30)
    assert first.nbytes == 4 * (48 + 40 + 30)
    assert str(mark) == "Mark(name='here')"
    assert isinstance(last, Operator)
    assert last.name == "add_"


def test_phases_are_noted_and_change_nothing() -> None:
    ran = []

    class Kernel:
        arg_names = ("x", "BM")

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *arguments, **tile: ran.append((grid, arguments, tile))

    kernel = Kernel()
    cpu, phases = torch.device("cpu"), [_launch.Phase("a", 3), _launch.Phase("b", 4)]
    with _launch.recording() as made:
        _launch.launch_in_phases(phases, kernel, (7,), cpu, 1, 2, BM=16)
        _launch.launch(kernel, (7,), cpu, 1)
    assert made[0] == _launch.Launch(kernel, (7,), (1, 2), {"BM": 16}, tuple(phases))
    assert made[1].phases == ()
    _launch.launch_in_phases(phases, kernel, (7,), cpu, 1, 2, BM=16)
    assert ran == [((7,), (1, 2), {"BM": 16, **_launch.OPTIONS})]


@pytest.mark.skipif(not interpreting(), reason="kernels are compiled here")
def test_interpreted_kernels_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
