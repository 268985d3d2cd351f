"""Selection with its rows, and the gather alone, forward and backward: shapes, inputs, gates, candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.micro.case import Candidate, Case, Gate, bench_device, compiled, where_kernels_run
from bench.micro.ceilings import Work
from bench.micro.gates import Outputs, require_equal
from bench.official import official_rows
from ocvtp_kernels.selection import gather_tokens, select_rows

# LLaVA-1.5 and LLaVA-NeXT at the paper's budgets: (K = keep, N).
_SHAPES = {"llava-64": (64, 576), "llava-192": (192, 576), "next-160": (160, 2880), "next-640": (640, 2880)}
_WIDTH = 1024
_INDEX = 8  # bytes
_SCORE = 4


class SelectInputs(NamedTuple):
    """``[B, K, N]``, ``[B, N]`` and ``[B, N, C]``."""

    attention: torch.Tensor
    fill: torch.Tensor
    x: torch.Tensor


class SelectExpected(NamedTuple):
    """Results of the reference."""

    indices: torch.Tensor
    from_slots: torch.Tensor
    rows: torch.Tensor


class GatherInputs(NamedTuple):
    """``[B, N, C]`` (forward) or ``[B, keep, C]`` (backward), and ``[B, keep]``."""

    x: torch.Tensor
    indices: torch.Tensor


def _size(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


@dataclass(frozen=True)
class SelectCase(Case[SelectInputs, SelectExpected]):
    """``select_rows``: a float32 map as the pruner leaves it, rows in the tower's dtype."""

    slots: int
    tokens: int
    width: int = _WIDTH

    op = "select_rows"
    family = "selection"

    @property
    def keep(self) -> int:
        """As many tokens as slots."""
        return self.slots

    def shape(self) -> dict[str, int]:
        """Sizes by letter."""
        return {"B": self.batch, "K": self.slots, "N": self.tokens, "keep": self.keep, "C": self.width}

    def candidates(self) -> Sequence[Candidate]:
        """Its implementations."""
        return _SELECT

    def work(self, candidate: str) -> Work:
        """The map and the scores, and the kept rows in and out. Comparisons are not counted."""
        rows = self.keep * self.width * _size(self.dtype)
        scores = (self.slots + 1) * self.tokens * _SCORE
        return Work(self.batch * (scores + rows), self.batch * (rows + (self.keep + 1) * _INDEX))

    def draw(self, seed: int, device: torch.device) -> SelectInputs:
        """Every second slot repeats its neighbour, so half the budget must be filled; no two scores tie."""
        generator = torch.Generator(device).manual_seed(seed)
        logits = 3 * torch.randn(self.batch, self.slots, self.tokens, generator=generator, device=device)
        logits[:, 1::2] = logits[:, 0::2][:, : self.slots // 2]
        order = torch.rand(self.batch, self.tokens, generator=generator, device=device).argsort(dim=1)
        x = torch.randn(self.batch, self.tokens, self.width, generator=generator, device=device)
        return SelectInputs(logits.softmax(dim=1), order.float() / self.tokens, x.to(self.dtype))

    def expect(self, inputs: SelectInputs) -> SelectExpected:
        """What the reference keeps."""
        return SelectExpected(
            *select_rows(inputs.attention, self.keep, inputs.fill, inputs.x, backend="torch")
        )

    def check(self, candidate: str, got: Outputs, expected: SelectExpected) -> Gate:
        """Same indices, same bits. The host-side dataflow does not count picks."""
        require_equal(f"{candidate}: indices", got[0], expected.indices)
        require_equal(f"{candidate}: rows", got[-1], expected.rows)
        if len(got) == len(expected):
            require_equal(f"{candidate}: picks", got[1], expected.from_slots)
        return {"equal_to": "reference"}


@dataclass(frozen=True)
class GatherCase(Case[GatherInputs, torch.Tensor]):
    """``gather_tokens`` alone."""

    keep: int
    tokens: int
    width: int = _WIDTH

    op = "gather_tokens"
    family = "selection"

    def shape(self) -> dict[str, int]:
        """Sizes by letter."""
        return {"B": self.batch, "N": self.tokens, "keep": self.keep, "C": self.width}

    def candidates(self) -> Sequence[Candidate]:
        """Its implementations."""
        return _GATHER

    def work(self, candidate: str) -> Work:
        """The kept rows in and out."""
        rows = self.batch * self.keep * self.width * _size(self.dtype)
        return Work(rows + self.batch * self.keep * _INDEX, rows)

    def draw(self, seed: int, device: torch.device) -> GatherInputs:
        """Distinct tokens in ascending order, as a selection has them."""
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(self.batch, self._rows(), self.width, generator=generator, device=device)
        order = torch.rand(self.batch, self.tokens, generator=generator, device=device).argsort(dim=1)
        return GatherInputs(x.to(self.dtype), order[:, : self.keep].sort(dim=1).values)

    def _rows(self) -> int:
        return self.tokens

    def expect(self, inputs: GatherInputs) -> torch.Tensor:
        """Rows picked by PyTorch's own indexing."""
        image = torch.arange(self.batch, device=inputs.x.device)[:, None]
        return inputs.x[image, inputs.indices]

    def check(self, candidate: str, got: Outputs, expected: torch.Tensor) -> Gate:
        """Same bits."""
        require_equal(f"{candidate}: rows", got[0], expected)
        return {"equal_to": "indexing"}


@dataclass(frozen=True)
class ScatterCase(GatherCase):
    """The gradient of ``gather_tokens``, without autograd's own cost: rows put back, zeros elsewhere."""

    op = "gather_tokens backward"

    def candidates(self) -> Sequence[Candidate]:
        """Its implementations."""
        return _SCATTER

    def work(self, candidate: str) -> Work:
        """The rows in, all tokens out."""
        row = self.width * _size(self.dtype)
        return Work(self.batch * self.keep * (row + _INDEX), self.batch * self.tokens * row)

    def _rows(self) -> int:
        return self.keep

    def expect(self, inputs: GatherInputs) -> torch.Tensor:
        """Rows put back by PyTorch's own indexing."""
        image = torch.arange(self.batch, device=inputs.x.device)[:, None]
        gradient = inputs.x.new_zeros(self.batch, self.tokens, self.width)
        gradient[image, inputs.indices] = inputs.x
        return gradient


def _select(backend: str, case: SelectCase, inputs: SelectInputs) -> Outputs:
    return select_rows(inputs.attention, case.keep, inputs.fill, inputs.x, backend=backend)


def _official(case: SelectCase, inputs: SelectInputs) -> Outputs:
    return official_rows(inputs.attention, inputs.fill, inputs.x, case.keep)


def _scatter(case: ScatterCase, inputs: GatherInputs) -> Outputs:
    """As autograd differentiates ``torch.gather``."""
    zeros = inputs.x.new_zeros(case.batch, case.tokens, case.width)
    where = inputs.indices[:, :, None].expand(-1, -1, case.width)
    return (zeros.scatter_add_(1, where, inputs.x),)


def _scatter_ours(case: ScatterCase, inputs: GatherInputs) -> Outputs:
    return (torch.ops.ocvtp_kernels.scatter_tokens(inputs.x, inputs.indices, case.tokens),)


_SELECT = (
    Candidate("ours", lambda case: lambda i: _select("triton", case, i), why_not=where_kernels_run),
    Candidate("reference", lambda case: lambda i: _select("torch", case, i)),
    Candidate(
        "official",
        lambda case: lambda i: _official(case, i),
        modes=("eager",),
        note="chooses on the host, one image at a time",
    ),
    Candidate("compiled", lambda case: compiled(lambda i: _select("torch", case, i)), compiled=True),
)
_GATHER = (
    Candidate(
        "ours",
        lambda case: lambda i: (gather_tokens(i.x, i.indices, backend="triton"),),
        why_not=where_kernels_run,
    ),
    Candidate("reference", lambda case: lambda i: (gather_tokens(i.x, i.indices, backend="torch"),)),
    Candidate(
        "compiled",
        lambda case: compiled(lambda i: (gather_tokens(i.x, i.indices, backend="torch"),)),
        compiled=True,
    ),
)
_SCATTER = (
    Candidate("ours", lambda case: lambda i: _scatter_ours(case, i), why_not=where_kernels_run),
    Candidate("reference", lambda case: lambda i: _scatter(case, i)),
    Candidate("compiled", lambda case: compiled(lambda i: _scatter(case, i)), compiled=True),
)


def select_cases() -> list[SelectCase]:
    """Rows are copied as integers, so one 16-bit dtype tells all; the other is there to see that, at B=8."""
    if bench_device().type != "cuda":
        return [SelectCase(name, 1, torch.float32, *_SHAPES[name]) for name in ("llava-64", "llava-192")]
    return [
        SelectCase(name, batch, dtype, *shape)
        for name, shape in _SHAPES.items()
        for batch in ((1, 8) if name == "next-640" else (1, 8, 64))
        for dtype in ((torch.float16, torch.bfloat16) if batch == 8 else (torch.float16,))
    ]


def gather_cases() -> list[GatherCase]:
    """The gather alone at the smallest and the largest common budget."""
    return [GatherCase(*_gather_shape(case)) for case in _gathered()]


def scatter_cases() -> list[ScatterCase]:
    """The same sizes, backwards."""
    return [ScatterCase(*_gather_shape(case)) for case in _gathered()]


def _gathered() -> list[SelectCase]:
    return [
        case
        for case in select_cases()
        if case.name in ("llava-64", "next-160") and case.dtype != torch.bfloat16
    ]


def _gather_shape(case: SelectCase) -> tuple[str, int, torch.dtype, int, int]:
    return case.name, case.batch, case.dtype, case.keep, case.tokens
