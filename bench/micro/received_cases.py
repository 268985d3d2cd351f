"""Received attention: shapes, inputs, a float64 oracle, gates, candidates."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bench.micro.case import Candidate, Case, Gate, bench_device, compiled, where_kernels_run
from bench.micro.ceilings import Work
from bench.micro.gates import GateError, Outputs, require_error, worst_error
from bench.official import official_received
from ocvtp_kernels.received_attention import received_attention

PEER = "flash-colreduce"
_STATISTIC = 4  # bytes of a log-sum-exp, and of a score
#: Ours may err this much, relative to the float64 oracle: twice what the reference errs, plus the rounding of
#: a float32 score.
SLACK, ROUNDING = 2.0, 2.0**-22
#: The others' bounds catch a wrong function, not rounding: what is compiled works in float32, the official
#: map and the peer's results are rounded to 16 bit.
_LOOSE = {"reference": 1e-5, "compiled": 1e-4, "official": 5e-2, "compiled official": 5e-2, PEER: 1e-2}
# The reference masks a packed batch over all pairs of its tokens, and torch.compile unrolls its blocks.
_MOST_MASKED, _MOST_UNROLLED = 32768, 1024
# CUDA's limit to the second dimension of a grid, where the peer counts sequences and heads.
_MOST_PROGRAMS = 65535
# Elements of the oracle's map that exist at a time.
_CHUNK = 2**26


class ReceivedInputs(NamedTuple):
    """``[B, H, N, d]`` twice, log-sum-exp ``[B, H, N]`` of the logits, segment bounds if packed."""

    q: torch.Tensor
    k: torch.Tensor
    lse: torch.Tensor
    bounds: torch.Tensor | None


class ReceivedExpected(NamedTuple):
    """The oracle's scores ``[sequences, N]``, and how much the reference errs from the same inputs."""

    scores: torch.Tensor
    reference_error: float


@dataclass(frozen=True)
class ReceivedCase(Case[ReceivedInputs, dict[bool, ReceivedExpected]]):
    """One encoder layer. ``segments`` > 0: that many sequences of ``tokens`` per image, packed as one."""

    heads: int
    tokens: int
    head_dim: int
    segments: int = 0

    op = "received_attention"
    family = "received-attention"

    @property
    def sequences(self) -> int:
        """How many sequences attend to themselves."""
        return self.batch * max(self.segments, 1)

    def shape(self) -> dict[str, int]:
        """Sizes by letter; S segments of N tokens if packed."""
        packed = {"S": self.sequences} if self.segments else {}
        return {"B": self.batch, "H": self.heads, "N": self.tokens, "d": self.head_dim, **packed}

    def candidates(self) -> Sequence[Candidate]:
        """Its implementations."""
        return _PACKED if self.segments else _DENSE

    def work(self, candidate: str) -> Work:
        """Without a map, its logits and exponentials must be computed twice unless the lse is given."""
        rows = self.sequences * self.heads * self.tokens
        passes = 1 if _given_lse(candidate) else 2
        size = torch.empty((), dtype=self.dtype).element_size()
        return Work(
            read=2 * rows * self.head_dim * size + (rows * _STATISTIC if _given_lse(candidate) else 0),
            written=self.sequences * self.tokens * _STATISTIC,
            flops=passes * 2 * rows * self.tokens * self.head_dim,
            exponentials=passes * rows * self.tokens,
        )

    def draw(self, seed: int, device: torch.device) -> ReceivedInputs:
        """q and k as a fused projection leaves them; logits of deviation 2, so that columns differ."""
        generator = torch.Generator(device).manual_seed(seed)
        packed = (1, self.sequences * self.tokens) if self.segments else (self.batch, self.tokens)
        qk = torch.randn(*packed, 2, self.heads, self.head_dim, generator=generator, device=device)
        q, k = (2**0.5 * qk).to(self.dtype).permute(2, 0, 3, 1, 4)
        lse = logsumexp(self.unpacked(q), self.unpacked(k)).float()
        bounds = None
        if self.segments:
            bounds = torch.arange(self.sequences + 1, dtype=torch.int32, device=device) * self.tokens
            lse = lse.transpose(0, 1).reshape(1, self.heads, -1)
        return ReceivedInputs(q, k, lse, bounds)

    def unpacked(self, x: torch.Tensor) -> torch.Tensor:
        """A view of packed ``[1, H, S N, ...]`` as ``[S, H, N, ...]``: all segments are equally long."""
        return x[0].unflatten(1, (-1, self.tokens)).transpose(0, 1) if self.segments else x

    def expect(self, inputs: ReceivedInputs) -> dict[bool, ReceivedExpected]:
        """By whether the lse, rounded to float32, is an input."""
        q, k, lse = (self.unpacked(x) for x in inputs[:3])
        expected = {}
        for given in (False, True):
            scores = oracle(q, k, lse if given else None)
            reference = received_attention(q, k, lse=lse if given else None, backend="torch")
            expected[given] = ReceivedExpected(scores, worst_error(reference, scores))
        return expected

    def check(self, candidate: str, got: Outputs, expected: dict[bool, ReceivedExpected]) -> Gate:
        """Ours: relative error of the worst image against what the reference errs; others: loose bounds."""
        scores, allowed = expected[_given_lse(candidate)]
        if got[0].numel() != scores.numel():
            raise GateError(f"{candidate}: shape {list(got[0].shape)} for {list(scores.shape)}")
        error = worst_error(got[0].reshape(scores.shape), scores)
        require_error("reference", allowed, _LOOSE["reference"])  # what defines ours' bound is right itself
        bound = _LOOSE.get(candidate)
        if bound is None:
            bound = SLACK * allowed + ROUNDING
        require_error(candidate, error, bound)
        if got[0].dtype != torch.float32 and candidate not in _LOOSE:
            raise GateError(f"{candidate}: scores in {got[0].dtype}")
        return {"error": error, "bound": bound, "reference_error": allowed}


def _given_lse(candidate: str) -> bool:
    return candidate.endswith("given lse")


def logsumexp(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Of each query's scaled logits, in float64."""
    parts = [
        (queries.double() @ keys.double().mT * q.shape[-1] ** -0.5).logsumexp(dim=-1)
        for queries, keys in _pieces(q, k)
    ]
    return _joined(parts, q)


def oracle(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over heads and queries of the map in float64, a few sequences and heads at a time: ``[B, N]``."""
    columns = []
    given = None if lse is None else _chunks(lse, _step(q))
    for index, (queries, keys) in enumerate(_pieces(q, k)):
        logits = queries.double() @ keys.double().mT * q.shape[-1] ** -0.5
        attention = (
            logits.softmax(dim=-1) if given is None else (logits - given[index].double()[..., None]).exp()
        )
        columns.append(attention.mean(dim=1))
    return _joined(columns, q).mean(dim=1)


def _step(q: torch.Tensor) -> int:
    """Maps (one of each sequence and head) that fit a chunk."""
    return max(1, _CHUNK // q.shape[2] ** 2)


def _chunks(x: torch.Tensor, step: int) -> tuple[torch.Tensor, ...]:
    return x.flatten(0, 1).split(step)


def _pieces(q: torch.Tensor, k: torch.Tensor) -> zip[tuple[torch.Tensor, torch.Tensor]]:
    return zip(_chunks(q, _step(q)), _chunks(k, _step(q)), strict=True)


def _joined(parts: list[torch.Tensor], q: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts).unflatten(0, q.shape[:2])


def _ours(case: ReceivedCase, inputs: ReceivedInputs) -> Outputs:
    return (received_attention(inputs.q, inputs.k, cu_seqlens=inputs.bounds, backend="triton"),)


def _ours_given_lse(case: ReceivedCase, inputs: ReceivedInputs) -> Outputs:
    return (
        received_attention(inputs.q, inputs.k, lse=inputs.lse, cu_seqlens=inputs.bounds, backend="triton"),
    )


def _reference(case: ReceivedCase, inputs: ReceivedInputs) -> Outputs:
    return (received_attention(inputs.q, inputs.k, cu_seqlens=inputs.bounds, backend="torch"),)


def _official(case: ReceivedCase, inputs: ReceivedInputs) -> Outputs:
    return (official_received(inputs.q, inputs.k, inputs.bounds),)


def _peer(case: ReceivedCase, inputs: ReceivedInputs) -> Outputs:
    """Sums over queries, per head, in the inputs' dtype; averaged here. It takes no bounds."""
    flash_colreduce = importlib.import_module("flash_colreduce").flash_colreduce
    q, k = case.unpacked(inputs.q), case.unpacked(inputs.k)
    sums = flash_colreduce(q, k, reduction="sum")
    return (sums.mean(dim=1, dtype=torch.float32).div_(case.tokens),)


def _masks_too_much(case: ReceivedCase, device: torch.device) -> str | None:
    tokens = case.sequences * case.tokens
    if case.segments and tokens > _MOST_MASKED:
        return f"the reference masks {tokens} x {tokens} pairs: seconds a call"
    return None


def _unrolls_too_much(case: ReceivedCase, device: torch.device) -> str | None:
    tokens = case.sequences * case.tokens if case.segments else case.tokens
    if tokens > _MOST_UNROLLED:
        return f"torch.compile unrolls the reference's {tokens // 128} blocks of queries"
    return None


def _no_peer(case: ReceivedCase, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"no GPU: {PEER} takes CUDA tensors alone"
    if importlib.util.find_spec("flash_colreduce") is None:
        return f"{PEER} is not installed (pip install --no-deps {PEER})"
    if case.sequences * case.heads > _MOST_PROGRAMS:
        return f"{PEER} can't launch {case.sequences} sequences of {case.heads} heads"
    return None


_OURS = (
    Candidate("ours", lambda case: lambda i: _ours(case, i), why_not=where_kernels_run),
    Candidate(
        "ours given lse",
        lambda case: lambda i: _ours_given_lse(case, i),
        why_not=where_kernels_run,
        note="the attention kernel's log-sum-exp is there already",
    ),
)
_REFERENCE = (
    Candidate("reference", lambda case: lambda i: _reference(case, i), why_not=_masks_too_much),
    Candidate(
        "compiled",
        lambda case: compiled(lambda i: _reference(case, i)),
        why_not=_unrolls_too_much,
        compiled=True,
    ),
)
_PEER = Candidate(
    PEER,
    lambda case: lambda i: _peer(case, i),
    why_not=_no_peer,
    note="float32 mean over heads added; packed segments are given to it as a batch",
)
_ONE_LAYER = "the map of this layer alone; the published code keeps those of all layers"
_DENSE = (
    *_OURS,
    *_REFERENCE,
    _PEER,
    Candidate("official", lambda case: lambda i: _official(case, i), note=_ONE_LAYER),
    Candidate(
        "compiled official",
        lambda case: compiled(lambda i: _official(case, i)),
        compiled=True,
        note=_ONE_LAYER,
    ),
)
_PACKED = (
    *_OURS,
    *_REFERENCE,
    _PEER,
    Candidate(
        "official",
        lambda case: lambda i: _official(case, i),
        modes=("eager",),
        note=_ONE_LAYER + "; reads segment lengths on the host",
    ),
)


def received_cases() -> list[ReceivedCase]:
    """CLIP-L/336 and SigLIP, and Qwen2.5-VL's two kinds of layer, packed, in the dtype it comes in."""
    if bench_device().type != "cuda":
        small = torch.float32
        return [
            ReceivedCase("clip-336", 1, small, 16, 577, 64),
            ReceivedCase("siglip", 1, small, 4, 196, 72),
            ReceivedCase("qwen-windows", 1, small, 4, 64, 80, segments=4),
            ReceivedCase("qwen-full", 1, small, 4, 256, 80, segments=1),
        ]
    dense = [
        ReceivedCase(name, batch, dtype, 16, tokens, head_dim)
        for name, tokens, head_dim in (("clip-336", 577, 64), ("siglip", 729, 72))
        for batch in (1, 8, 64)
        for dtype in (torch.float16, torch.bfloat16)
    ]
    packed = [
        ReceivedCase(name, batch, torch.bfloat16, 16, tokens, 80, segments=4096 // tokens)
        for name, tokens in (("qwen-windows", 64), ("qwen-full", 4096))
        for batch in (1, 8, 64)
    ]
    return dense + packed
