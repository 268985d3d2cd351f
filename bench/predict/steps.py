"""What a call does on a GPU, one thing after another: launches of our kernels, operators of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from bench.guard.count import ARCH
from bench.guard.watch import Watch
from ocvtp_kernels._arch import pretend
from ocvtp_kernels._launch import Launch, recording

_FRESH = ("empty", "new_empty")


class Operator(NamedTuple):
    """One operator of PyTorch that computes something: one kernel, as a rule.

    Attributes:
        name: of the operator.
        nbytes: of the tensors that it reads and writes.
        flops: floating-point operations, by PyTorch's formulas; those of matrix products, that is.
        outputs: numbers that it writes.
    """

    name: str
    nbytes: int
    flops: int
    outputs: int


class Mark(NamedTuple):
    """A place in a call that somebody named."""

    name: str


Step = Launch | Operator | Mark


class Steps(Watch):
    """Notes steps in their order, with :func:`ocvtp_kernels._launch.recording` around it.

    Args:
        launches: the list that is recorded into.
    """

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._recorded = launches
        self._noted = len(launches)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.catch_up()
        ours = str(func.name()).removesuffix(".default") in self._launchers
        if not ours and not func.is_view and not func._opname.startswith(_FRESH):
            self.steps.append(_operator(func, args, kwargs or {}, result))
        return result

    def mark(self, name: str) -> None:
        """Name this place."""
        self.catch_up()
        self.steps.append(Mark(name))

    def catch_up(self) -> None:
        """Note the launches made since the last step."""
        self.steps += self._recorded[self._noted :]
        self._noted = len(self._recorded)


def _operator(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Operator:
    outputs = [leaf for leaf in tree_iter(result) if isinstance(leaf, torch.Tensor)]
    tensors = {id(leaf): leaf for leaf in tree_iter((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
    formula = flop_registry.get(func._overloadpacket)
    flops = int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0
    nbytes = sum(_stored(tensor) for tensor in tensors.values())
    return Operator(str(func._opname), nbytes, flops, sum(tensor.numel() for tensor in outputs))


def _stored(tensor: torch.Tensor) -> int:
    """Bytes of its elements; one that is repeated by a stride of 0 counts once."""
    total = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        total *= size if stride or size == 0 else 1
    return total


def steps_of(call: Callable[[Steps], object], arch: str = ARCH, before: int = 1) -> list[Step]:
    """What a ``call`` does with tensors on ``meta``, as on a GPU of ``arch``; no kernel runs.

    Args:
        call: gets the notes, to mark places in them.
        arch: whose tiles are taken.
        before: calls to make before: they make what later ones keep.
    """
    with pretend(arch), torch.no_grad():
        for _ in range(before + 1):
            with recording() as launches, Steps(launches) as noted:
                call(noted)
                noted.catch_up()
    return noted.steps


def between(steps: list[Step], begin: str, end: str) -> list[Step]:
    """Steps after the last mark ``begin`` that has an ``end`` behind it, up to that one.

    Raises:
        ValueError: there are no such marks.
    """
    last = max((i for i, step in enumerate(steps) if step == Mark(end)), default=None)
    first = max((i for i, step in enumerate(steps[:last]) if step == Mark(begin)), default=None)
    if first is None or last is None:
        raise ValueError(f"no {begin!r} before an {end!r}")
    return [step for step in steps[first:last] if not isinstance(step, Mark)]
