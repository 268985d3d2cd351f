"""Slot Attention to top tokens, and the whole pruner: shapes, inputs, a float64 oracle, gates, candidates."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.flop_counter import flop_registry

from bench.micro.case import (
    Candidate,
    Case,
    Function,
    Gate,
    anywhere,
    bench_device,
    compiled,
    where_kernels_run,
)
from bench.micro.ceilings import Arithmetic, Work
from bench.micro.gates import GateError, Outputs, require_equal, require_error, worst_error
from bench.micro.slot_inputs import Models, Widths, random_features, random_models, random_weights
from bench.official import official_attention, official_rows
from ocvtp_kernels.selection import select_from_keys, select_rows, select_tokens
from ocvtp_kernels.slot_attention import (
    FoldedWeights,
    SlotAttentionWeights,
    SlotStart,
    fold,
    folded,
    slot_attention,
    start_from_slots,
    top_tokens,
)

# LLaVA-1.5 and LLaVA-NeXT at the paper's budgets: (K = keep, N).
_SHAPES = {"llava-64": (64, 576), "llava-192": (192, 576), "next-160": (160, 2880), "next-640": (640, 2880)}
_OFFICIAL = Widths()
_ITERATIONS, _EPS = 3, 1e-5
_KEY, _SCORE, _INDEX = 8, 4, 8  # bytes
#: Images of a batch that are compared with the oracle; the others must be finite and name real tokens.
CHECKED = 8
# Autotuning takes a minute or more for each shape and precision.
_COMPILED = {("llava-64", 1), ("llava-64", 64), ("next-160", 1), ("next-160", 64)}


class Bounds(NamedTuple):
    """How far from the float64 oracle a result may be.

    Attributes:
        error: relative, of each token's largest attention and of each slot's.
        shortfall: by how much the exact attention of a slot's pick may miss the slot's best, relative to it:
            rounding may decide near ties alone.
        different: share of slots, or of kept tokens, that may differ,
        few: and how many may in any case, where a share is less than that.
    """

    error: float
    shortfall: float
    different: float
    few: int


#: By precision. The largest error and the most picks moved, on a CPU at these widths, one image at a time:
#: float32 2e-6, none; operands rounded to float16 2e-3, 6 of 640 (0.9 %); rounded to TF32 2e-3, 2 of 640; cut
#: off to it, as tensor cores do with what they are given, 5e-3, 7 of 640 (1.1 %); all in float16 4e-3, 6 of
#: 160. Every moved pick was within 4e-3 of the slot's best: that bound is the tight one.
BOUNDS = {
    "fp32": Bounds(1e-5, 1e-4, 0.001, 1),
    "tf32": Bounds(1e-2, 1e-2, 0.02, 2),
    "fp16": Bounds(5e-3, 1e-2, 0.02, 2),
}
_HALF = Bounds(2e-2, 2e-2, 0.05, 4)
_ARITHMETIC: dict[str, Arithmetic] = {"fp32": "fp32", "tf32": "tf32", "fp16": "16-bit"}


class SlotInputs(NamedTuple):
    """Features of two layers ``[B, N, C]``, for slots and for the kept rows; fill scores; a checkpoint.

    The forms of it that one candidate alone takes are last: ``half`` and ``plain_half``.
    """

    features: torch.Tensor
    x: torch.Tensor
    fill: torch.Tensor
    models: Models
    half: tuple[SlotStart, FoldedWeights]
    plain_half: SlotAttentionWeights


class SlotExpected(NamedTuple):
    """The oracle's attention ``[images, K, N]`` and kept tokens ``[images, keep]``, of the checked images."""

    images: torch.Tensor
    attention: torch.Tensor
    kept: torch.Tensor
    x: torch.Tensor


@dataclass(frozen=True)
class SlotCase(Case[SlotInputs, SlotExpected]):
    """``top_tokens``: features of the tower's dtype to every slot's top token."""

    slots: int
    tokens: int
    widths: Widths = _OFFICIAL

    op = "top_tokens"
    family = "slot-attention"

    def shape(self) -> dict[str, int]:
        """Sizes by letter."""
        c, h, d, m = self.widths
        return {"B": self.batch, "N": self.tokens, "K": self.slots, "C": c, "H": h, "D": d, "M": m}

    def candidates(self) -> Sequence[Candidate]:
        """Its implementations."""
        return _TOP_TOKENS

    def work(self, candidate: str) -> Work:
        """The folded dataflow's products, and the weights in the precision that it is named after."""
        least = _least(self.widths, self.slots, self.tokens, self.batch, precision(candidate) == "fp16")
        features = self.batch * self.tokens * self.widths.features * _size(self.dtype)
        return Work(
            read=features + least.parameters,
            written=self.batch * (self.slots * _KEY + self.tokens * (_SCORE + 1)),
            flops=least.flops,
            exponentials=self.batch * _ITERATIONS * self.slots * self.tokens,
            arithmetic=_ARITHMETIC[precision(candidate)],
        )

    def draw(self, seed: int, device: torch.device) -> SlotInputs:
        """Features in clusters with one channel far above the rest; one checkpoint, but memory of its own."""
        generator = torch.Generator(device).manual_seed(seed)
        features, x = (
            random_features(self.batch, self.tokens, self.widths.features, self.dtype, generator)
            for _ in range(2)
        )
        order = torch.rand(self.batch, self.tokens, generator=generator, device=device).argsort(dim=1)
        models = random_models(self.widths, self.slots, device)
        plain_half = SlotAttentionWeights(*(t.half() for t in models.plain))
        return SlotInputs(features, x, order.float() / self.tokens, models, models.half(), plain_half)

    def finish(self, attention: torch.Tensor, x: torch.Tensor, fill: torch.Tensor) -> Outputs:
        """What PyTorch makes of a map ``[B, K, N]``."""
        return folded.top_tokens(attention)

    def expect(self, inputs: SlotInputs) -> SlotExpected:
        """The plain form in float64, of a few images of a large batch."""
        images = torch.linspace(0, self.batch - 1, min(self.batch, CHECKED)).round().long()
        images = images.to(inputs.features.device)
        attention = oracle(inputs.features[images], inputs.models)
        kept, _ = select_tokens(attention, self.slots, inputs.fill[images], backend="torch")
        return SlotExpected(images, attention, kept, inputs.x)

    def check(self, candidate: str, got: Outputs, expected: SlotExpected) -> Gate:
        """Picks, the attention that they are said to have, and each token's largest, against the oracle."""
        keys, largest, finite = got
        expect_shape(f"{candidate}: keys", keys, (self.batch, keys.shape[1], self.slots), torch.int64)
        expect_shape(f"{candidate}: largest", largest, (self.batch, self.tokens), torch.float32)
        expect_shape(f"{candidate}: finite", finite, (self.batch, self.tokens), torch.bool)
        best = keys.amax(dim=1)
        picks = 0x7FFFFFFF - (best & 0x7FFFFFFF)
        if not bool(finite.all()) or not bool(((picks >= 0) & (picks < self.tokens)).all()):
            raise GateError(f"{candidate}: NaN, or a pick that is no token")
        picks = picks[expected.images]
        scores = (best >> 32).int().view(torch.float32)[expected.images]
        exact = expected.attention.gather(2, picks[:, :, None])[:, :, 0]
        highest, winners = expected.attention.max(dim=2)
        bounds = bounds_of(candidate)
        error = max(
            worst_error(largest[expected.images], expected.attention.amax(dim=1)), worst_error(scores, exact)
        )
        require_error(candidate, error, bounds.error)
        shortfall = float(((highest - exact) / highest).max())
        require_error(f"{candidate}: picks", shortfall, bounds.shortfall)
        share = require_share(f"{candidate}: top tokens", picks != winners, bounds)
        return {
            "error": error,
            "bound": bounds.error,
            "shortfall": shortfall,
            "top_tokens_equal": share,
            "images": len(expected.images),
        }


@dataclass(frozen=True)
class PrunerCase(SlotCase):
    """The whole pruner: features and fill scores in, kept tokens and their rows out, as many as slots."""

    op = "pruner"

    def shape(self) -> dict[str, int]:
        """Sizes by letter."""
        return {**super().shape(), "keep": self.slots}

    def candidates(self) -> Sequence[Candidate]:
        """Its implementations."""
        return _PRUNER

    def work(self, candidate: str) -> Work:
        """Top tokens never leave the chip; fill scores and the kept rows come in, rows and indices go out."""
        inner = super().work(candidate)
        rows = self.batch * self.slots * self.widths.features * _size(self.dtype)
        return Work(
            read=inner.read + self.batch * self.tokens * _SCORE + rows,
            written=rows + self.batch * (self.slots + 1) * _INDEX,
            flops=inner.flops,
            exponentials=inner.exponentials,
            arithmetic=inner.arithmetic,
        )

    def finish(self, attention: torch.Tensor, x: torch.Tensor, fill: torch.Tensor) -> Outputs:
        """What PyTorch makes of a map ``[B, K, N]``."""
        return select_rows(attention, self.slots, fill, x, backend="torch")

    def check(self, candidate: str, got: Outputs, expected: SlotExpected) -> Gate:
        """Kept tokens against the oracle's; rows bit for bit those of the tokens said to be kept."""
        indices, rows = got[0], got[-1]
        expect_shape(f"{candidate}: indices", indices, (self.batch, self.slots), torch.int64)
        ends = bool((indices[:, 0] >= 0).all() and (indices[:, -1] < self.tokens).all())
        if not ends or not bool((indices.diff(dim=1) > 0).all()):
            raise GateError(f"{candidate}: indices that don't ascend from 0 to {self.tokens} exclusive")
        image = torch.arange(self.batch, device=indices.device)[:, None]
        require_equal(f"{candidate}: rows", rows, expected.x[image, indices])
        own = indices[expected.images]
        strange = ~(own[:, :, None] == expected.kept[:, None, :]).any(dim=2)
        share = require_share(f"{candidate}: kept tokens", strange, bounds_of(candidate))
        return {"error": 1.0 - share, "kept_equal": share, "images": len(expected.images)}


def precision(candidate: str) -> str:
    """Of a candidate's products: the last word of its name. "ours" is float16, the official code float32."""
    if candidate == "official":
        return "fp32"
    last = candidate.split()[-1]
    return last if last in BOUNDS else "fp16"


def bounds_of(candidate: str) -> Bounds:
    """Of the gate. Baselines in float16 round everything to it, vectors and sums included."""
    if precision(candidate) == "fp16" and not candidate.startswith("ours"):
        return _HALF
    return BOUNDS[precision(candidate)]


def oracle(features: torch.Tensor, models: Models) -> torch.Tensor:
    """Attention of the plain form in float64, one image at a time: ``[B, K, N]``."""
    weights = SlotAttentionWeights(*(t.double() for t in models.plain))
    slots = models.slots.double()
    return torch.cat([_plain(image, slots, weights) for image in features.split(1)])


def expect_shape(what: str, got: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise :class:`GateError` unless it is."""
    if got.shape != shape or got.dtype != dtype:
        raise GateError(f"{what}: {got.dtype} {list(got.shape)} instead of {dtype} {list(shape)}")


def require_share(what: str, different: torch.Tensor, bounds: Bounds) -> float:
    """The share that does not differ.

    Raises:
        GateError: more differ than ``bounds`` allow.
    """
    count = int(different.sum())
    if count > max(bounds.few, int(bounds.different * different.numel())):
        raise GateError(f"{what}: {count} of {different.numel()} differ from the oracle's")
    return 1.0 - count / different.numel()


class _Least(NamedTuple):
    """Bytes of weights and constants, and floating-point operations of a batch."""

    parameters: int
    flops: int


@functools.cache
def _least(widths: Widths, slots: int, tokens: int, batch: int, mixed: bool) -> _Least:
    weights = fold(SlotAttentionWeights(*(t.to("meta") for t in random_weights(widths))))
    start = start_from_slots(torch.empty(1, slots, widths.slots, device="meta"), weights)
    features = torch.empty(batch, tokens, widths.features, device="meta")
    formula = flop_registry[torch.ops.ocvtp_kernels.slot_assignment]
    flops = formula(features, *start, *weights, _ITERATIONS, _EPS, False, False, out_val=None)
    # Ours has matrices, and the queries to start with, in the products' precision, and vectors in float32.
    matrices = start.queries.numel() + sum(t.numel() for t in weights if t.ndim == 2)
    numbers = sum(t.numel() for t in (*start, *weights))
    return _Least(4 * numbers - (2 * matrices if mixed else 0), int(flops))


def _size(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """Let PyTorch round float32 operands to TF32, which it doesn't by default."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _plain(features: torch.Tensor, slots: torch.Tensor, weights: SlotAttentionWeights) -> torch.Tensor:
    """Attention as the paper writes it, in the dtype of ``slots``; the last update is computed, too."""
    return slot_attention(
        features.to(slots.dtype),
        slots,
        weights,
        num_iters=_ITERATIONS,
        eps=_EPS,
        truncate=False,
        backend="torch",
    )[1]


def _folded(
    case: SlotCase,
    features: torch.Tensor,
    x: torch.Tensor,
    fill: torch.Tensor,
    start: SlotStart,
    weights: FoldedWeights,
) -> Outputs:
    dtype = weights.query_weight.dtype
    attention = folded.slot_assignment(features.to(dtype), start, weights, _ITERATIONS, _EPS)
    return case.finish(attention, x, fill)


def _form(of: str, i: SlotInputs) -> tuple[SlotStart, FoldedWeights]:
    """The folded checkpoint for PyTorch in a precision."""
    return i.half if of == "fp16" else i.models.folded


def _ours(of: str, case: SlotCase, i: SlotInputs) -> Outputs:
    start, weights = i.models.mixed if of == "fp16" else i.models.folded
    found = top_tokens(
        i.features, start, weights, num_iters=_ITERATIONS, eps=_EPS, backend="triton", tf32=of == "tf32"
    )
    if not isinstance(case, PrunerCase):
        return found
    indices, from_slots, rows = select_from_keys(found.keys, case.slots, i.fill, i.x, backend="triton")
    assert rows is not None
    return indices, from_slots, rows


def _eager(of: str, case: SlotCase, i: SlotInputs) -> Outputs:
    half = of == "fp16"
    slots = i.models.slots.half() if half else i.models.slots
    return case.finish(_plain(i.features, slots, i.plain_half if half else i.models.plain), i.x, i.fill)


def _official(case: SlotCase, i: SlotInputs) -> Outputs:
    attention = official_attention(i.features.float(), i.models.slots, i.models.plain)
    return official_rows(attention, i.fill, i.x, case.slots)


def _compiled(of: str, case: SlotCase) -> Function:
    # Without CUDA graphs of its own: the graph mode captures it.
    function = compiled(functools.partial(_folded, case), mode="max-autotune-no-cudagraphs")

    def call(i: SlotInputs) -> Outputs:
        with _tf32() if of == "tf32" else contextlib.nullcontext():
            return function(i.features, i.x, i.fill, *_form(of, i))

    return call


def _slow_on_a_cpu(case: SlotCase, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "no GPU: a CPU multiplies in float32"


def _compiles_long(case: SlotCase, device: torch.device) -> str | None:
    if (case.name, case.batch) not in _COMPILED:
        return "autotuning takes minutes: compiled for llava-64 and next-160 at B=1 and B=64 alone"
    return _slow_on_a_cpu(case, device)


def _same_as_folded(case: SlotCase, device: torch.device) -> str | None:
    return "its products are cuBLAS's, as those of folded fp32" if device.type == "cuda" else None


def _candidate(
    name: str,
    function: Callable[[str, SlotCase, SlotInputs], Outputs],
    why_not: Callable[[SlotCase, torch.device], str | None],
    note: str = "",
) -> Candidate:
    return Candidate(
        name, lambda case: functools.partial(function, precision(name), case), why_not=why_not, note=note
    )


def _compiled_candidate(
    of: str, why_not: Callable[[SlotCase, torch.device], str | None], note: str
) -> Candidate:
    return Candidate(
        f"compiled {of}", lambda case: _compiled(of, case), why_not=why_not, compiled=True, note=note
    )


_ALL_HALF = "everything in float16, vectors and sums too"
_AUTOTUNED = "folded; max-autotune-no-cudagraphs"


def _folded_eagerly(of: str, case: SlotCase, i: SlotInputs) -> Outputs:
    return _folded(case, i.features, i.x, i.fill, *_form(of, i))


_OURS = (
    _candidate("ours fp16", _ours, where_kernels_run, "float16 operands, float32 sums"),
    _candidate("ours tf32", _ours, where_kernels_run),
    _candidate("ours fp32", _ours, where_kernels_run, "three TF32 products for one"),
)
_FOLDED = (
    _candidate("folded fp16", _folded_eagerly, _slow_on_a_cpu, _ALL_HALF),
    _candidate("folded fp32", _folded_eagerly, anywhere, "what this package runs without Triton"),
)
_COMPILED_FOLDED = (
    _compiled_candidate("fp16", _compiles_long, f"{_AUTOTUNED}; {_ALL_HALF}"),
    _compiled_candidate("tf32", _compiles_long, f"{_AUTOTUNED}; float32 with TF32 products allowed"),
    _compiled_candidate("fp32", _same_as_folded, _AUTOTUNED),
)
_TOP_TOKENS = (
    *_OURS,
    *_FOLDED,
    _candidate("eager fp16", _eager, _slow_on_a_cpu, f"not folded, three updates; {_ALL_HALF}"),
    _candidate("eager fp32", _eager, anywhere, "not folded, three updates"),
    *_COMPILED_FOLDED,
)
_PRUNER = (
    *_OURS,
    *_FOLDED,
    Candidate(
        "official",
        lambda case: lambda i: _official(case, i),
        modes=("eager",),
        note="float32; chooses on the host, one image at a time",
    ),
    *_COMPILED_FOLDED,
)


def slot_cases() -> list[SlotCase]:
    """Official widths. On a GPU in the dtype that LLaVA's tower runs in."""
    if bench_device().type != "cuda":
        return [SlotCase("llava-64", 1, torch.float32, *_SHAPES["llava-64"])]
    return [
        SlotCase(name, batch, torch.float16, *shape)
        for name, shape in _SHAPES.items()
        for batch in ((1, 8) if name == "next-640" else (1, 8, 64))
    ]


def pruner_cases() -> list[PrunerCase]:
    """The same sizes."""
    return [
        PrunerCase(case.name, case.batch, case.dtype, case.slots, case.tokens, case.widths)
        for case in slot_cases()
    ]
