"""No kernel has a race: not between programs, nor between a program's own threads; none leaves its tensors.

Every launch is logged and searched (``findings.py``), and results have the same bits in whatever order
programs run, and if each runs twice. Sizes are odd, and more than one program works at each image.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

import ocvtp_kernels
from ocvtp_kernels._arch import interpreting, pretend
from ocvtp_kernels._launch import recording
from tests.kernels.triton_device import bits
from tests.races import findings
from tests.races.cases import CASES, Call, Case
from tests.races.instrument import Launch, Order, instrumented

pytestmark = pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter")

#: What a kernel may do, and why that is no race.
ALLOWED = {
    (
        "select",
        findings.SAME_BITS,
    ): "each of an image's programs makes the whole selection, and reads its own",
}
#: Kernels that work in place, so that a program would go on where it stopped. None runs twice on a GPU.
ONCE = {
    "farthest": "the keys of a step lie where those of the last but one were",
    "volume": "what is left of each token's volume becomes less with every step",
}
#: Kernels whose programs wait for each other: test_ordered_loop.py.
BY_TICKETS = {"ocvtp_kernels.slot_attention.loop.slot_loop"}
#: "twice" shuffles, too. All other tests run programs forward.
FEW: tuple[Order, ...] = ("reversed", "twice")
ALL: tuple[Order, ...] = ("forward", "reversed", "shuffled", "twice")
ARCHITECTURES = ("sm90", "sm80", "sm86", "sm100", "gfx942")


def results(call: Call, order: Order, *, log: bool = False) -> tuple[list[torch.Tensor], list[Launch]]:
    """Bits of what a call makes, and its launches."""
    with instrumented(order, log=log, seed=7, once=ONCE) as launches:
        made = call()
    return [bits(tensor).clone() for tensor in made if tensor is not None], launches


def wrong(case: Case, orders: tuple[Order, ...]) -> list[str]:
    """Findings of a call in the first order, one line each; and those orders that make other bits of it."""
    call = case.make()
    want, launches = results(call, orders[0], log=True)
    assert launches
    found = {
        f"{finding.kernel} {finding.kind}: {finding.count}, e.g. {finding.example}": None
        for launch in launches
        for finding in findings.analyse(launch)
        if (finding.kernel, finding.kind) not in ALLOWED
    }
    for order in orders[1:]:
        got, _ = results(call, order)
        if len(got) != len(want) or not all(map(torch.equal, got, want)):
            found[f"{order}: other bits than {orders[0]}"] = None
    return list(found)


@pytest.mark.parametrize("case", [case for case in CASES if not case.thorough], ids=lambda case: case.name)
def test_no_race(case: Case) -> None:
    assert wrong(case, FEW) == []


@pytest.mark.thorough
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_race_with_the_tiles_of_any_gpu(case: Case, arch: str) -> None:
    with pretend(arch):
        assert wrong(case, ALL) == []


# -------------------------------------------------------------------------------------------- completeness


def jit_functions() -> dict[str, set[str]]:
    """Every ``@triton.jit`` function of the package -> those that it names, by module and name."""
    found: dict[str, set[str]] = {}
    for info in pkgutil.walk_packages(ocvtp_kernels.__path__, "ocvtp_kernels."):
        module = importlib.import_module(info.name)
        for value in vars(module).values():
            if isinstance(value, interpreter.InterpretedFunction) and value.fn.__module__ == info.name:
                tree = ast.parse(textwrap.dedent(inspect.getsource(value.fn)))
                names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
                used = (vars(module).get(name) for name in names)
                found[full_name(value)] = {
                    full_name(one) for one in used if isinstance(one, interpreter.InterpretedFunction)
                }
    return found


def full_name(function: interpreter.InterpretedFunction) -> str:
    return f"{function.fn.__module__}.{function.fn.__name__}"


def launched(case: Case) -> set[str]:
    call = case.make()
    with recording() as recorded:
        call()
    return {full_name(launch.kernel) for launch in recorded}


def test_no_kernel_is_left_out() -> None:
    """A function that no other one names is a kernel. What is launched every day has to be all of them."""
    functions = jit_functions()
    kernels = set(functions) - set().union(*functions.values())
    assert len(kernels) > 20
    reached = set().union(*(launched(case) for case in CASES if not case.thorough))
    assert reached | BY_TICKETS == kernels


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("select, scanned", {"select"}),
        ("reconstruction, whole", {"token_weights"}),
        ("diversity, a launch a step", {"farthest", "volume"}),
    ],
)
def test_barriers_are_needed(name: str, kernels: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any of them, there are findings; so what this file calls clean is not what it can't see."""
    monkeypatch.setattr(tl, "debug_barrier", lambda **_: None)
    found = wrong(next(case for case in CASES if case.name == name), FEW[:1])
    assert {line.split()[0] for line in found} == kernels
    assert all(findings.NO_BARRIER in line or findings.TOO_EARLY in line for line in found)


def test_what_is_allowed_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ALLOWED", {})
    kinds = {
        (launch.kernel, finding.kind)
        for case in CASES
        if case.name.startswith("select") and not case.thorough
        for launch in results(case.make(), "forward", log=True)[1]
        for finding in findings.analyse(launch)
    }
    assert kinds == {("select", findings.SAME_BITS)}
