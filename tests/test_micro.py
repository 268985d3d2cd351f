"""The microbenchmarks' gates, floors, clocks and records; and the suite itself, once, at its smallest."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness import device_slug
from bench.micro import case as cases_module
from bench.micro import received_cases as received_module
from bench.micro import reconstruction_cases as reconstruction_module
from bench.micro import selection_cases as selection_module
from bench.micro import slot_cases as slot_module
from bench.micro.case import Candidate, Case, bench_device, rows
from bench.micro.ceilings import CEILINGS, Work, floor
from bench.micro.coverage_cases import RoundCase
from bench.micro.gates import GateError, poison, poisoned_memory, require_equal, worst_error
from bench.micro.measure import CLOCK, late_after, measure, prepared
from bench.micro.merge_cases import MergeCase, SpreadCase
from bench.micro.received_cases import ReceivedCase, logsumexp, oracle, received_cases
from bench.micro.reconstruction_cases import (
    LossCase,
    TrainedLossCase,
    loss_cases,
    official_loss,
    trained_loss_cases,
)
from bench.micro.record import Recorder, with_speedups
from bench.micro.selection_cases import (
    GatherCase,
    ScatterCase,
    SelectCase,
    gather_cases,
    scatter_cases,
    select_cases,
)
from bench.micro.slot_cases import PrunerCase, SlotCase, pruner_cases, slot_cases
from bench.micro.slot_inputs import Folded, Widths, random_models
from bench.micro.timing import COVER, Clock, EagerRound, GraphRound, rounds_in, sets_needed
from ocvtp_kernels._arch import interpreting
from ocvtp_kernels.coverage import refine
from ocvtp_kernels.received_attention import received_attention
from ocvtp_kernels.reconstruction import area_weighted_mse
from ocvtp_kernels.selection import gather_tokens, select_rows
from ocvtp_kernels.slot_attention import (
    FoldedWeights,
    SlotAttentionWeights,
    SlotStart,
    folded,
    slot_attention,
)
from tests.fake_cuda import FakeCuda

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
MB = 1024**2

SELECT = SelectCase("tiny", 2, torch.float32, 4, 24, 8)
GATHER = GatherCase("tiny", 2, torch.float32, 4, 24, 8)
SCATTER = ScatterCase("tiny", 2, torch.float32, 4, 24, 8)
DENSE = ReceivedCase("tiny", 2, torch.float32, 2, 20, 16)
PACKED = ReceivedCase("tiny", 2, torch.float32, 2, 8, 16, segments=3)
SLOTS = SlotCase("tiny", 2, torch.float32, 4, 24, Widths(24, 40, 16, 32))
PRUNER = PrunerCase("tiny", 2, torch.float32, 10, 24, Widths(24, 40, 16, 32))
LOSS = LossCase("tiny", 2, torch.float32, 8, 24, 12)
TRAINED = TrainedLossCase("tiny", 2, torch.float32, 8, 24, 12)
ROUND = RoundCase("tiny", 2, torch.float32, 6, 24, width=12)
MERGE = MergeCase("tiny", 2, torch.float32, 6, 24, width=12)
SPREAD = SpreadCase("tiny", 2, torch.float32, 6, 24, width=12)
TINY = (SELECT, GATHER, SCATTER, DENSE, PACKED, LOSS, TRAINED, ROUND, MERGE, SPREAD, SLOTS, PRUNER)


pytestmark = pytest.mark.usefixtures("fresh_inputs")


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases as on a GPU; nothing runs there."""
    for module in (cases_module, selection_module, received_module, reconstruction_module, slot_module):
        monkeypatch.setattr(module, "bench_device", lambda: torch.device("cuda", 0))


class Rounds:
    """pytest-benchmark's fixture, as far as it is used."""

    group: str | None = None
    enabled = True

    def pedantic(self, target: Callable[[], None], *, rounds: int) -> None:
        for _ in range(rounds):
            target()


def candidate(case: Case, name: str) -> Candidate:
    return next(each for each in case.candidates() if each.name == name)


def take(case: Case, which: Candidate, recorder: Recorder, mode: str = "eager", **changes: Any) -> dict:
    arguments = {"benchmark": Rounds(), "device": CPU, "seconds": 0.0, **changes}
    return measure(case, which, mode, recorder=recorder, **arguments)


def written(folder: Path, family: str = "selection") -> dict:
    return json.loads((folder / device_slug(CPU) / f"micro-{family}.json").read_text())


# ---------------------------------------------------------------------------------------------------- floors


def test_received_attention_floor_by_hand() -> None:
    case = ReceivedCase("clip-336", 64, torch.float16, 16, 577, 64)
    maps = 64 * 16 * 577 * 577
    work, given = case.work("ours"), case.work("ours given lse")
    assert work.read == 2 * 64 * 16 * 577 * 64 * 2
    assert work.written == 64 * 577 * 4
    assert (work.exponentials, work.flops) == (2 * maps, 2 * 2 * maps * 64)
    assert (given.exponentials, given.flops) == (maps, 2 * maps * 64)
    assert given.read - work.read == 64 * 16 * 577 * 4
    # 16 exponentials a clock on each of 132 multiprocessors at 1.755 GHz.
    least = floor(work, CEILINGS["h100"])
    assert (least.us, least.limit) == (pytest.approx(2 * maps / (16 * 132 * 1755)), "exponentials")
    assert least.us == pytest.approx(184, abs=0.5)
    assert floor(given, CEILINGS["h100"]).us == pytest.approx(92, abs=0.5)


def test_selection_floor_by_hand() -> None:
    case = SelectCase("llava-64", 64, torch.float16, 64, 576)
    work = case.work("ours")
    assert work.read == 64 * (64 * 576 * 4 + 576 * 4 + 64 * 1024 * 2)
    assert work.written == 64 * (64 * 1024 * 2 + 64 * 8 + 8)
    for device, bandwidth in (("h100", 3.35e6), ("h200", 4.8e6)):
        least = floor(work, CEILINGS[device])
        assert (least.us, least.limit) == (pytest.approx(work.bytes / bandwidth), "bytes")
    assert floor(work, CEILINGS["h100"]).us == pytest.approx(8, abs=0.3)


def test_reconstruction_floor_by_hand() -> None:
    forward = LossCase("next-640", 12, torch.float16, 640, 2880).work("ours")
    rows, attention = 12 * 2880 * 1024 * 2, 12 * 640 * 2880 * 4
    assert forward == Work(2 * rows + 2 * attention, 12 * 4)
    assert TrainedLossCase("next-640", 12, torch.float16, 640, 2880).work("ours") == Work(
        4 * rows + 2 * attention, 12 * 4 + rows
    )
    least = floor(forward, CEILINGS["h100"])
    assert (least.us, least.limit) == (pytest.approx(95, abs=0.5), "bytes")


def test_gather_and_packed_work_by_hand() -> None:
    forward, backward = GATHER.work("ours"), SCATTER.work("ours")
    assert forward == Work(2 * 4 * (8 * 4 + 8), 2 * 4 * 8 * 4)
    assert backward == Work(2 * 4 * (8 * 4 + 8), 2 * 24 * 8 * 4)
    assert PACKED.work("ours").exponentials == 2 * (2 * 3) * 2 * 8 * 8
    assert PACKED.shape() == {"B": 2, "H": 2, "N": 8, "d": 16, "S": 6}


@pytest.mark.parametrize(("arithmetic", "us"), [("16-bit", 1000), ("tf32", 1998), ("fp32", 5994)])
def test_matrix_bound_floor(arithmetic: Any, us: float) -> None:
    """float32 as exactly as tensor cores can: three TF32 products for one."""
    for device in ("h100", "h200"):
        least = floor(Work(8, 8, flops=989 * 10**9, arithmetic=arithmetic), CEILINGS[device])
        assert (least.us, least.limit) == (pytest.approx(us, rel=1e-3), "flops")


def test_slot_attention_floor_by_hand() -> None:
    case = SlotCase("llava-64", 1, torch.float16, 64, 576)
    n, k, c, h, d, m = 576, 64, 1024, 2048, 512, 2048
    # Three maps, two means; two updates, whose hidden gates and queries are constant the first time.
    attention, update = n * k * d, k * d * (3 * d + 2 * m + d)
    products = n * (c * h + h * d) + 5 * attention + 2 * update + k * d * 3 * d
    matrices = h * c + d * h + d * d + 6 * d * d + 2 * m * d + k * d  # and the first queries
    vectors = h + d + d + 4 * 3 * d - 3 * d + 3 * d + m + d + k * d + k + k * 3 * d - 3 * d
    for candidate_name, size, rate in (
        ("ours fp16", 2, 989e6),
        ("ours tf32", 4, 495e6),
        ("eager fp32", 4, 165e6),
    ):
        work = case.work(candidate_name)
        assert work.flops == 2 * products
        assert work.read == n * c * 2 + matrices * size + vectors * 4
        assert work.written == k * 8 + n * (4 + 1)
        assert work.exponentials == 3 * n * k
        assert floor(work, CEILINGS["h100"]).us >= work.flops / rate
    assert case.work("ours").flops == pytest.approx(4.72e9, rel=1e-3)
    assert case.work("ours") == case.work("ours fp16")
    many = dataclasses.replace(case, batch=64).work("ours")
    assert many.flops == 64 * 2 * products
    least = floor(many, CEILINGS["h100"])
    assert (least.us, least.limit) == (pytest.approx(305, abs=1), "flops")  # 302 GFLOP at 989 TFLOP/s


def test_pruner_work_by_hand() -> None:
    inner = dataclasses.replace(SLOTS, slots=10).work("ours fp32")
    whole = PRUNER.work("ours fp32")
    rows = 2 * 10 * 24 * 4
    assert whole.read == inner.read + 2 * 24 * 4 + rows
    assert whole.written == rows + 2 * (10 + 1) * 8
    assert (whole.flops, whole.exponentials, whole.arithmetic) == (inner.flops, inner.exponentials, "fp32")
    assert PRUNER.work("official").arithmetic == PRUNER.work("compiled fp32").arithmetic == "fp32"
    assert PRUNER.work("compiled tf32").arithmetic == "tf32"


# ------------------------------------------------------------------------------------------ what is measured


@pytest.mark.usefixtures("a_gpu")
def test_what_a_gpu_measures() -> None:
    cases = [*select_cases(), *gather_cases(), *scatter_cases(), *received_cases()]
    cases += [*slot_cases(), *pruner_cases()]
    assert len({case.label + case.op for case in cases}) == len(cases)
    for op in {case.op for case in cases}:
        assert {case.batch for case in cases if case.op == op} == {1, 8, 64}
    assert {case.dtype for case in cases} == {torch.float16, torch.bfloat16}
    parameters = rows(cases)
    assert len({parameter.id for parameter in parameters}) == len(parameters)
    modes: dict[str, set[str]] = {}
    for parameter in parameters:
        case, which, mode = parameter.values
        modes.setdefault(f"{case.op} {which.name} {'packed' if 'qwen' in case.name else ''}", set()).add(mode)
    assert all(each == {"graph", "eager"} for name, each in modes.items() if " ours" in name)
    assert modes["select_rows official "] == modes["received_attention official packed"] == {"eager"}
    assert modes["pruner official "] == {"eager"}
    last = [parameter.values[1].compiled for parameter in parameters]
    assert last == sorted(last)  # compiling comes last


@pytest.mark.usefixtures("a_gpu")
def test_what_the_reconstruction_score_is_compared_with() -> None:
    names = ["ours", "ours official", "reference", "official", "compiled", "compiled official"]
    for cases in (loss_cases(), trained_loss_cases()):
        shapes = [tuple(case.shape().values()) for case in cases]
        assert list(dict.fromkeys(shapes)) == [
            (1, 576, 1024, 64),
            (12, 576, 1024, 64),
            (12, 2880, 1024, 640),
        ]
        assert {case.dtype for case in cases} == {torch.float16, torch.bfloat16}
        assert [each.name for each in cases[0].candidates()] == names
        parameters = rows(cases)
        assert len({parameter.id for parameter in parameters}) == len(parameters) == 6 * 6 * 2


def test_the_published_loss_is_ours_with_empty_slots_as_published() -> None:
    inputs = LOSS.draw(0, CPU)
    assert (inputs.attention.argmax(dim=1) % 4 != 3).all()  # some own no token
    ours = area_weighted_mse(*inputs, empty_slots="official", reduction="none")
    torch.testing.assert_close(official_loss(*inputs), ours)
    assert not torch.allclose(area_weighted_mse(*inputs, reduction="none"), ours, rtol=1e-3)


@pytest.mark.usefixtures("a_gpu")
def test_what_slot_attention_is_compared_with() -> None:
    gpu = torch.device("cuda", 0)
    shapes = [(case.tokens, case.slots, case.batch) for case in slot_cases()]
    assert shapes == [
        *((576, 64, batch) for batch in (1, 8, 64)),
        *((576, 192, batch) for batch in (1, 8, 64)),
        *((2880, 160, batch) for batch in (1, 8, 64)),
        *((2880, 640, batch) for batch in (1, 8)),
    ]
    assert {case.widths for case in slot_cases()} == {(1024, 2048, 512, 2048)}
    assert [(case.tokens, case.slots, case.batch) for case in pruner_cases()] == shapes
    ours = ["ours fp16", "ours tf32", "ours fp32"]
    plain = ["eager fp16", "eager fp32"]
    compiled_too = ["compiled fp16", "compiled tf32", "compiled fp32"]
    for case, extra in ((slot_cases()[0], plain), (pruner_cases()[0], ["official"])):
        names = [each.name for each in case.candidates()]
        assert names == [*ours, "folded fp16", "folded fp32", *extra, *compiled_too]
    timed = {
        (case.name, case.batch)
        for case in (*slot_cases(), *pruner_cases())
        for each in case.candidates()
        if each.compiled and each.why_not(case, gpu) is None
    }
    assert timed == {("llava-64", 1), ("llava-64", 64), ("next-160", 1), ("next-160", 64)}


@pytest.mark.usefixtures("a_gpu")
def test_rotation_covers_the_cache() -> None:
    cases = [*select_cases(), *gather_cases(), *scatter_cases(), *received_cases(), *slot_cases()]
    for case in (*cases, *pruner_cases()):
        read = case.work("ours").read
        for l2 in (50 * MB, 60 * MB):
            sets = sets_needed(read, case.batch, l2)
            if case.batch == 1:
                assert sets == 1
            else:
                assert sets * read >= COVER * l2
                assert (sets - 1) * read < COVER * l2
    assert sets_needed(1, 8, 0) == 1  # a CPU


def test_drawn_inputs_are_what_they_say() -> None:
    inputs = SELECT.draw(0, CPU)
    assert torch.equal(inputs.attention[:, 1::2].argmax(2), inputs.attention[:, 0::2].argmax(2))  # must fill
    assert all(row.unique().numel() == SELECT.tokens for row in inputs.fill)  # no ties
    assert not torch.equal(inputs.x, SELECT.draw(1, CPU).x)
    q, k, lse, bounds = PACKED.draw(0, CPU)
    assert q.shape == k.shape == (1, 2, 48, 16)
    assert bounds.tolist() == list(range(0, 49, 8))
    slots = SLOTS.draw(0, CPU)
    assert slots.features.shape == slots.x.shape == (2, 24, 24)
    assert slots.features[..., 7].std() > 20 * slots.features[..., 8].std()
    assert not torch.equal(slots.features, SLOTS.draw(1, CPU).features)
    again = SLOTS.draw(1, CPU).models.plain.query_weight
    assert torch.equal(slots.models.plain.query_weight, again)  # one checkpoint
    assert slots.models.plain.query_weight.data_ptr() != again.data_ptr()
    received = received_attention(q, k, lse=lse, cu_seqlens=bounds, backend="torch")
    torch.testing.assert_close(received, received_attention(q, k, cu_seqlens=bounds, backend="torch"))


@pytest.mark.parametrize("shape", [(2, 3, 7, 4), (1, 1, 1, 8)])
@pytest.mark.parametrize("chunk", [1, 2**26])
def test_oracle_is_the_map(shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(received_module, "_CHUNK", chunk)
    q, k = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    logits = q @ k.mT * shape[-1] ** -0.5
    want = logits.softmax(-1).mean(dim=(1, 2))
    torch.testing.assert_close(oracle(q, k), want)
    torch.testing.assert_close(logsumexp(q, k), logits.logsumexp(-1))
    torch.testing.assert_close(oracle(q, k, logsumexp(q, k)), want)


# ----------------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.op} {case.candidates()[-1].name}")
def test_everything_that_runs_here_passes_its_gate(case: Case, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, CPU)
    for which in case.candidates():
        if which.compiled:
            continue
        if which.why_not(case, CPU) is None:
            row = take(case, which, recorder)
            assert row["gate"]["input_sets"] == 1
            assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        else:
            with pytest.raises(pytest.skip.Exception, match="no GPU: "):
                take(case, which, recorder)
    assert {row["implementation"] for row in written(tmp_path, case.family)["rows"]} == {
        which.name for which in case.candidates() if not which.compiled and which.why_not(case, CPU) is None
    }


@pytest.mark.skipif(not interpreting(), reason="Triton doesn't interpret here")
@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.op} {case.candidates()[-1].name}")
def test_interpreted_kernels_pass_the_gate_that_a_gpu_has_to(case: Case) -> None:
    inputs = case.draw(0, CPU)
    expected = case.expect(inputs)
    for which in case.candidates():
        if which.ours:
            with poisoned_memory(), torch.no_grad():
                case.check(which.name, which.make(case)(inputs), expected)


def off_by_one(case: Any, i: Any) -> Any:
    indices, count, taken = select_rows(i.attention, case.keep, i.fill, i.x, backend="torch")
    return indices.roll(1, dims=1), count, taken


def a_wrong_bit(case: Any, i: Any) -> Any:
    indices, count, taken = select_rows(i.attention, case.keep, i.fill, i.x, backend="torch")
    taken[-1, -1, -1] *= 1 + 2**-20
    return indices, count, taken


def a_miscount(case: Any, i: Any) -> Any:
    indices, count, taken = select_rows(i.attention, case.keep, i.fill, i.x, backend="torch")
    return indices, count + 1, taken


def unwritten(case: Any, i: Any) -> Any:
    received = received_attention(i.q, i.k, backend="torch")
    received[0, 3] = torch.nan
    return (received,)


def one_image_off(case: Any, i: Any) -> Any:
    received = received_attention(i.q, i.k, backend="torch")
    received[1] *= 1 + 1e-5
    return (received,)


def other_empty_slots(case: Any, i: Any) -> Any:
    return case.results(reconstruction_module._loss("torch", "official"), i)


def loss_in_half(case: Any, i: Any) -> Any:
    return tuple(t.half() for t in case.results(reconstruction_module._loss("torch"), i))


def half_a_gradient(case: Any, i: Any) -> Any:
    loss, gradient = case.results(reconstruction_module._loss("torch"), i)
    gradient[1, 5] *= 0.5
    return loss, gradient


def without_a_scale(case: Any, i: Any) -> Any:
    return (received_attention(i.q, i.k, 1.0, backend="torch"),)


def nothing_moved(case: Any, i: Any) -> Any:
    return (i.indices,)


def covering_less(case: Any, i: Any) -> Any:
    """The first token and those nearest to it: one cluster of many."""
    return ((i.x - i.x[:, :1]).square().sum(dim=2).argsort(dim=1)[:, :6].sort(dim=1).values,)


def two_alike(case: Any, i: Any) -> Any:
    moved = refine(*i, 1)
    moved[0, 1] = moved[0, 0]
    return (moved,)


@pytest.mark.parametrize(
    ("case", "wrong", "message"),
    [
        (SELECT, off_by_one, "indices: 8 of 8 differ"),
        (SELECT, a_wrong_bit, r"rows: 1 of 64 differ, first at \[1, 3, 7\]"),
        (SELECT, a_miscount, "picks: 2 of 2"),
        (GATHER, lambda case, i: (gather_tokens(i.x, i.indices.flip(1)),), "rows: "),
        (SCATTER, lambda case, i: (torch.zeros(2, 24, 8),), "rows: "),
        (DENSE, unwritten, "relative error nan"),
        (DENSE, one_image_off, "relative error 1.00e-05, more than"),
        (DENSE, without_a_scale, "relative error"),
        (DENSE, lambda case, i: (received_attention(i.q, i.k)[:, 1:],), "shape"),
        (LOSS, other_empty_slots, "ours: error: relative error"),
        (LOSS, loss_in_half, "losses in torch.float16"),
        (LOSS, lambda case, i: (official_loss(*i),), "relative error"),
        (TRAINED, half_a_gradient, "ours: gradient_error: relative error"),
        (ROUND, nothing_moved, "relative error"),
        (ROUND, covering_less, "coverage error rose"),
        (ROUND, two_alike, "not ascending, unique"),
        (ROUND, lambda case, i: (refine(*i, 1).flip(1),), "not ascending"),
        (ROUND, lambda case, i: (refine(*i, 1) + 24,), "of the image"),
        (ROUND, lambda case, i: (refine(*i, 1).int(),), "int32"),
    ],
)
def test_no_figure_for_a_wrong_implementation(
    case: Case, wrong: Callable[[Any, Any], Any], message: str, tmp_path: Path
) -> None:
    """Not even the one it had when it was right."""
    recorder = Recorder(tmp_path, CPU, commit="abc")
    right = dataclasses.replace(candidate(case, "reference"), name="ours")
    take(case, right, recorder)
    assert len(written(tmp_path, case.family)["rows"]) == 1
    broken = Candidate("ours", lambda case: lambda i: wrong(case, i))
    prepared.cache_clear()
    with pytest.raises(GateError, match=message):
        take(case, broken, recorder)
    assert written(tmp_path, case.family)["rows"] == []


def test_rounds_work_by_hand() -> None:
    rows = 2 * 24 * 12
    work = ROUND.work("ours")
    assert (work.read, work.written) == (rows * 4 + 2 * 6 * 8, 2 * 6 * 8)
    assert (work.flops, work.arithmetic) == (3 * 2 * rows * 6, "fp32")
    peer = ROUND.work("flash-kmeans")
    assert (peer.read, peer.written) == (rows * 4 + 2 * 6 * 12 * 4, 2 * 6 * 12 * 4)
    assert peer.flops == 2 * 2 * rows * 6


def folded_with(case: SlotCase, i: Any, model: Folded, num_iters: int = 3, eps: float = 1e-5) -> Any:
    attention = folded.slot_assignment(i.features, *model, num_iters, eps)
    return case.finish(attention, i.x, i.fill)


def off_by_a_token(case: Any, i: Any) -> Any:
    keys, largest, finite = folded_with(case, i, i.models.folded)
    return keys - 1, largest, finite  # the next token, with the attention of the right one


def one_image_for_another(case: Any, i: Any) -> Any:
    return tuple(tensor.flip(0) for tensor in folded_with(case, i, i.models.folded))


def unwritten_tokens(case: Any, i: Any) -> Any:
    keys, largest, finite = folded_with(case, i, i.models.folded)
    largest[1, 5] = torch.nan
    return keys, largest, finite


def not_finite(case: Any, i: Any) -> Any:
    keys, largest, finite = folded_with(case, i, i.models.folded)
    finite[1, 5] = False
    return keys, largest, finite


def no_tokens(case: Any, i: Any) -> Any:
    keys, largest, finite = folded_with(case, i, i.models.folded)
    return torch.full_like(keys, torch.iinfo(torch.int64).max - case.tokens * 0x100), largest, finite


def rows_of_others(case: Any, i: Any) -> Any:
    indices, count, taken = folded_with(case, i, i.models.folded)
    return indices, count, taken.flip(1)


def rows_of_the_slots_layer(case: Any, i: Any) -> Any:
    return folded_with(case, i._replace(x=i.features), i.models.folded)


def unsorted(case: Any, i: Any) -> Any:
    return tuple(t.flip(1) if t.ndim > 1 else t for t in folded_with(case, i, i.models.folded))


def others_kept(case: Any, i: Any) -> Any:
    indices, count, _ = folded_with(case, i, i.models.folded)
    kept = torch.zeros(case.batch, case.tokens).scatter_(1, indices, 1.0)
    indices = kept.argsort(dim=1)[:, : case.slots].sort(dim=1).values
    return indices, count, gather_tokens(i.x, indices)


@pytest.mark.parametrize(
    ("case", "wrong", "message"),
    [
        (SLOTS, off_by_a_token, "relative error|picks|a pick"),
        (SLOTS, one_image_for_another, "relative error"),
        (SLOTS, unwritten_tokens, "relative error nan"),
        (SLOTS, not_finite, "NaN, or a pick"),
        (SLOTS, no_tokens, "NaN, or a pick"),
        (SLOTS, lambda case, i: folded_with(case, i, i.models.folded, num_iters=2), "relative error"),
        (SLOTS, lambda case, i: folded_with(case, i, i.models.folded, eps=1e-1), "relative error"),
        (SLOTS, lambda case, i: [t[:1] for t in folded_with(case, i, i.models.folded)], "keys: "),
        (PRUNER, rows_of_others, "rows: "),
        (PRUNER, rows_of_the_slots_layer, "rows: "),
        (PRUNER, unsorted, "ascend"),
        (PRUNER, others_kept, "kept tokens: 20 of 20 differ"),
        (PRUNER, lambda case, i: folded_with(case, i._replace(fill=-i.fill), i.models.folded), "kept tokens"),
    ],
)
def test_no_figure_for_a_wrong_pruner(
    case: SlotCase, wrong: Callable[[Any, Any], Any], message: str, tmp_path: Path
) -> None:
    right = Candidate("ours fp32", lambda case: lambda i: folded_with(case, i, i.models.folded))
    broken = Candidate("ours fp32", lambda case: lambda i: wrong(case, i))
    recorder = Recorder(tmp_path, CPU, commit="abc")
    take(case, right, recorder)
    prepared.cache_clear()
    with pytest.raises(GateError, match=message):
        take(case, broken, recorder)
    assert written(tmp_path, case.family)["rows"] == []


@pytest.mark.parametrize(("name", "factor"), [("ours fp32", 1.01), ("ours fp16", 1.5), ("folded fp16", 2.0)])
def test_every_weight_counts(name: str, factor: float) -> None:
    """A gate sees any tensor of the folded checkpoint scaled; a float32 one, scaled by one percent."""
    inputs = SLOTS.draw(0, CPU)
    expected = SLOTS.expect(inputs)
    start, weights = inputs.models.folded
    SLOTS.check(name, folded_with(SLOTS, inputs, (start, weights)), expected)
    for field in (*SlotStart._fields, *FoldedWeights._fields):
        mutated = (
            start._replace(**{field: getattr(start, field) * factor})
            if field in SlotStart._fields
            else start,
            weights._replace(**{field: getattr(weights, field) * factor})
            if field in FoldedWeights._fields
            else weights,
        )
        got = folded_with(SLOTS, inputs, mutated)
        with pytest.raises(GateError):
            SLOTS.check(name, got, expected)


def test_the_slot_oracle_is_the_published_form_and_not_ours() -> None:
    inputs = SLOTS.draw(0, CPU)
    weights = SlotAttentionWeights(*(t.double() for t in inputs.models.plain))
    _, want = slot_attention(inputs.features.double(), inputs.models.slots.double(), weights, backend="torch")
    expected = SLOTS.expect(inputs)
    torch.testing.assert_close(expected.attention, want)
    assert expected.kept.tolist() == select_rows(want, 4, inputs.fill, inputs.x)[0].tolist()


def test_of_a_large_batch_a_few_images_are_compared_and_all_are_looked_at() -> None:
    case = dataclasses.replace(SLOTS, batch=20)
    inputs = case.draw(0, CPU)
    expected = case.expect(inputs)
    assert expected.images.tolist() == [0, 3, 5, 8, 11, 14, 16, 19]
    got = folded_with(case, inputs, inputs.models.folded)
    assert case.check("ours fp32", got, expected)["images"] == 8
    got[2][1, 3] = False
    with pytest.raises(GateError, match="NaN"):
        case.check("ours fp32", got, expected)


def test_near_ties_alone_may_be_decided_otherwise() -> None:
    bounds = slot_module.Bounds(error=1.0, shortfall=1.0, different=0.01, few=1)
    assert slot_module.require_share("x", torch.tensor([True] + 63 * [False]), bounds) == 63 / 64
    with pytest.raises(GateError, match="x: 2 of 64 differ"):
        slot_module.require_share("x", torch.tensor(2 * [True] + 62 * [False]), bounds)
    assert slot_module.bounds_of("ours fp16") == slot_module.BOUNDS["fp16"]
    assert slot_module.bounds_of("compiled tf32") == slot_module.BOUNDS["tf32"]
    assert slot_module.bounds_of("official") == slot_module.BOUNDS["fp32"]
    assert slot_module.bounds_of("eager fp16").error > slot_module.BOUNDS["fp16"].error


def test_float16_baselines_are_float16_throughout() -> None:
    half = random_models(SLOTS.widths, 4, CPU).half()
    assert {tensor.dtype for part in half for tensor in part} == {torch.float16}
    inputs = SLOTS.draw(0, CPU)
    expected = SLOTS.expect(inputs)
    for which in SLOTS.candidates():
        if which.name in ("folded fp16", "eager fp16"):  # not timed on a CPU, but they run
            gate = SLOTS.check(which.name, which.make(SLOTS)(inputs), expected)
            assert gate["error"] > 1e-4
            assert "everything in float16" in which.note


def test_tf32_is_allowed_for_its_candidate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
        assert mode == "max-autotune-no-cudagraphs"
        return lambda *arguments: (seen.append(torch.get_float32_matmul_precision()), function(*arguments))[1]

    monkeypatch.setattr(slot_module, "compiled", compiled)
    for case in (SLOTS, PRUNER):
        inputs = case.draw(0, CPU)
        expected = case.expect(inputs)
        for name in ("compiled fp32", "compiled tf32", "compiled fp16"):
            case.check(name, candidate(case, name).make(case)(inputs), expected)
    assert seen == 2 * ["highest", "high", "highest"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_wrong_reference_does_not_widen_ours_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = DENSE.draw(0, CPU)
    monkeypatch.setattr(
        received_module, "received_attention", lambda q, k, **_: received_attention(q, k, 1.0)
    )
    expected = DENSE.expect(inputs)
    with pytest.raises(GateError, match="reference: "):
        DENSE.check("ours", (received_attention(inputs.q, inputs.k, 1.0),), expected)


def test_half_precision_baselines_report_their_error() -> None:
    case = dataclasses.replace(DENSE, dtype=torch.bfloat16)
    inputs = case.draw(0, CPU)
    expected = case.expect(inputs)
    official = candidate(case, "official").make(case)(inputs)
    gate = case.check("official", official, expected)
    assert 1e-4 < gate["error"] < gate["bound"] == 5e-2
    assert expected[False].reference_error < 1e-6
    with pytest.raises(GateError, match="more than"):
        case.check("ours", official, expected)


@pytest.mark.parametrize("case", [DENSE, PACKED], ids=["dense", "packed"])
def test_the_peers_sums_become_our_means(case: ReceivedCase, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = pytest.importorskip("flash_colreduce")
    monkeypatch.setattr(peer, "flash_colreduce", peer.naive_colreduce)  # the peer's own reference
    inputs = case.draw(0, CPU)
    got = candidate(case, received_module.PEER).make(case)(inputs)
    assert case.check("ours", got, case.expect(inputs))["error"] < 1e-6


def test_gates_see_what_nothing_wrote() -> None:
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()
    outputs = [(torch.zeros(2), torch.zeros(2, dtype=torch.int64))]
    poison(outputs)
    assert outputs[0][0].isnan().all()
    assert outputs[0][1].tolist() == [-1, -1]
    flags = torch.ones(2, dtype=torch.bool)
    poison([(flags,)])
    assert not flags.any()
    with pytest.raises(GateError):
        require_equal("x", torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    with pytest.raises(GateError, match="float32"):
        require_equal("x", torch.zeros(2), torch.zeros(2).double())
    assert worst_error(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])) == 1.0


def test_a_compiler_that_fails_skips_its_baseline(tmp_path: Path) -> None:
    def make(case: Any) -> Any:
        def fail(inputs: Any) -> Any:
            raise RuntimeError("no C++ compiler\nat /some/path")

        return fail

    with pytest.raises(pytest.skip.Exception, match=r"compile failed: RuntimeError: no C\+\+ compiler$"):
        take(SELECT, Candidate("compiled", make, compiled=True), Recorder(tmp_path, CPU))


# ---------------------------------------------------------------------------------------------------- timing


def test_eager_rounds_rotate_and_last_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    order: list[int] = []

    def call(index: int) -> Callable[[], Any]:
        def run() -> Any:
            nonlocal now
            now += 0.001
            order.append(index)
            return ()

        return run

    monkeypatch.setattr("bench.micro.timing.time.perf_counter", lambda: now)
    timed = EagerRound([call(0), call(1), call(2)], CPU, seconds=0.0045)
    assert timed.calls == 5
    assert timed() == pytest.approx(0.001)
    assert order == [0, 1, 2, 0, 1, 2, 0]  # two single calls to size the round, then it


def test_rounds_and_clock() -> None:
    assert rounds_in(0.0, 1.0) == 5
    assert rounds_in(10.0, 0.5) == 20
    assert rounds_in(10.0, 1e-6) == 50
    clock = Clock()
    before = clock()
    clock.advance(0.25)
    assert clock() - before == 0.25


def test_the_clock_shows_what_was_measured(tmp_path: Path) -> None:
    shown: list[float] = []

    class Watched(Rounds):
        def pedantic(self, target: Callable[[], None], *, rounds: int) -> None:
            for _ in range(rounds):
                start = CLOCK()
                target()
                shown.append(CLOCK() - start)

    row = take(GATHER, candidate(GATHER, "reference"), Recorder(tmp_path, CPU), benchmark=Watched())
    assert 1e6 * sorted(shown)[len(shown) // 2] == pytest.approx(row["median_us"], rel=1e-6)


def test_graph_rounds_hold_all_sets_and_last_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """With graphs and events that only count: what is captured, and what a call is said to take."""
    order: list[int] = []
    captured: list[int] = []
    replayed: list[int] = []

    class Graph:
        def replay(self) -> None:
            replayed.append(captured[-1])

    def record(work: Callable[[], Any], stream: str) -> tuple[Any, Graph]:
        assert stream == "a side stream of cpu"
        before = len(order)
        outputs = work()
        captured.append(len(order) - before)
        return outputs, Graph()

    class Event:
        def __init__(self, **_: Any) -> None:
            pass

        def record(self) -> None:
            pass

        synchronize = record

        def elapsed_time(self, end: Event) -> float:
            return 0.05 * replayed[-1]  # 50 us a call

    monkeypatch.setattr("bench.micro.timing.record_graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a side stream of {device}")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr("bench.micro.timing._enough", lambda each, seconds: 4)  # as if Python took long

    def call(index: int) -> Callable[[], Any]:
        return lambda: (order.append(index), torch.tensor(index))[1:]

    timed = GraphRound([call(0), call(1), call(2)], CPU, seconds=0.002)
    assert captured == [6, 42]  # two passes; then, as 6 calls take 0.3 ms, seven times as many
    assert timed.calls == len(timed.outputs) == 42
    assert [int(output[0]) for output in timed.outputs] == [0, 1, 2] * 14
    assert timed() == pytest.approx(50e-6)


def test_a_graph_round_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)

    def call() -> Any:
        if cuda.capturing:
            raise RuntimeError("CUDA out of memory")

    cuda.fails = ["end"]
    with pytest.raises(RuntimeError, match="out of memory"):
        GraphRound([call], CPU, seconds=1e-6)
    assert cuda.left() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.op} {case.candidates()[-1].name}")
def test_a_gpu_times_graphs_and_eager_calls(case: Case, tmp_path: Path) -> None:
    case = dataclasses.replace(case, dtype=torch.float16)
    recorder = Recorder(tmp_path, bench_device())
    for which in case.candidates():
        if not which.compiled and which.why_not(case, bench_device()) is None:
            for mode in which.modes:
                row = take(case, which, recorder, mode, device=bench_device())
                assert row["mode"] == mode
                assert row["median_us"] > 0
                if recorder.ceilings:
                    assert row["percent_of_floor"] < 105


# --------------------------------------------------------------------------------------------------- records


def test_rows_say_where_they_come_from_and_nothing_more(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, CPU)
    for name in ("reference", "official"):
        take(SELECT, candidate(SELECT, name), recorder)
    record = written(tmp_path)
    assert {"date", "commit", "device", "threads", "python", "torch", "triton"} <= record.keys()
    assert "small sizes" in record["note"]
    assert record["ceilings"] is None
    row = record["rows"][0]
    assert row["shape"] == {"B": 2, "K": 4, "N": 24, "keep": 4, "C": 8}
    assert (row["dtype"], row["mode"], row["inputs"]) == ("float32", "eager", "warm: one set")
    assert row["gate"]["equal_to"] == "reference"
    assert "floor_us" not in row
    assert row["least_work"]["read"] == SELECT.work("ours").read
    text = json.dumps(record)
    assert not any(private in text for private in (platform.node(), str(tmp_path), str(ROOT)))
    assert not re.search(r'"[^"]*(/(home|work|tmp|root|usr)\b|[A-Z]:\\\\)', text)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["micro-selection.json"]


def test_a_run_in_parts(tmp_path: Path) -> None:
    reference, official = candidate(SELECT, "reference"), candidate(SELECT, "official")
    take(SELECT, reference, Recorder(tmp_path, CPU, commit="abc"))
    take(SELECT, official, Recorder(tmp_path, CPU, commit="abc"))
    take(SELECT, official, Recorder(tmp_path, CPU, commit="abc"))
    assert [row["implementation"] for row in written(tmp_path)["rows"]] == ["reference", "official"]
    take(SELECT, official, Recorder(tmp_path, CPU, commit="abd"))
    assert [row["implementation"] for row in written(tmp_path)["rows"]] == ["official"]
    for commit in ("abc-dirty", "unknown"):
        for which in (reference, official):
            take(SELECT, which, Recorder(tmp_path, CPU, commit=commit))
        assert [row["implementation"] for row in written(tmp_path)["rows"]] == ["official"]
    (tmp_path / device_slug(CPU) / "micro-selection.json").write_text("{half a fi")
    take(SELECT, reference, Recorder(tmp_path, CPU, commit="abc"))
    assert len(written(tmp_path)["rows"]) == 1


def test_speedups_compare_like_with_like() -> None:
    def row(implementation: str, mode: str, median: float, batch: int = 1) -> dict[str, Any]:
        setting = {"op": "x", "case": "y", "shape": {"B": batch}, "dtype": "float16"}
        return {**setting, "implementation": implementation, "mode": mode, "median_us": median}

    found = with_speedups(
        [
            row("ours", "graph", 2.0),
            row("ours", "eager", 10.0),
            row("ours given lse", "graph", 1.0),
            row("reference", "graph", 6.0),
            row("reference", "eager", 50.0),
            row("official", "eager", 100.0),
            row("reference", "graph", 99.0, batch=8),
        ]
    )
    assert [each.get("speedup_over") for each in found] == [
        {"reference": 3.0},
        {"reference": 5.0, "official": 10.0},
        {"reference": 6.0},
        {},
        {"official": 2.0},
        None,
        {},
    ]


# ------------------------------------------------------------------------------------------------- the suite


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Without a GPU, whether or not there is one; a worker of pytest-xdist would time nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env={**kept, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_suite_on_a_cpu(tmp_path: Path) -> None:
    result = run(
        *(
            sys.executable,
            "-m",
            "pytest",
            "bench/micro",
            "-k",
            "not compiled and not clip",
            "-rs",
            "--seconds",
            "0",
        ),
        *("--record", "--results", str(tmp_path), "--commit", "abc"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "no GPU: interpreted kernels tell nothing about speed" in result.stdout
    assert "small sizes" in result.stdout
    assert "Median" in result.stdout  # pytest-benchmark's table
    families = (
        ("selection", 6),
        ("received-attention", 6),
        ("reconstruction", 8),
        ("coverage", 2),
        ("merge", 4),
        ("diversity", 4),
        ("slot-attention", 4),
    )
    for family, least in families:
        record = written(tmp_path, family)
        assert record["commit"] == "abc"
        assert len(record["rows"]) == least
        assert all(row["shape"]["B"] == 1 for row in record["rows"])


def test_a_deadline_starts_no_row() -> None:
    late_after(100.0, 90.0)
    late_after(None, 1e9)
    with pytest.raises(pytest.skip.Exception, match="no row is started after 100 s"):
        late_after(100.0, 101.0)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_gpu_targets_refuse_without_a_gpu() -> None:
    targets = ("gpu-tests", "gpu-micro-selection", "gpu-micro-received", "gpu-micro-reconstruction")
    targets += tuple(f"gpu-micro-slots-{part}" for part in ("kernels", "pruner", "compiled"))
    result = run("make", "--keep-going", *targets, f"GPU_PYTHON={sys.executable}")
    assert result.returncode != 0
    assert "needs a CUDA GPU" in result.stdout
    assert "-m pytest" not in result.stdout
    assert all(target in result.stderr for target in targets)  # not remade because of errors
