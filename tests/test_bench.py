"""The benchmarks' own gates and statistics."""

from __future__ import annotations

import pytest
import torch

from bench import pruner as bench_pruner
from bench.harness import interleaved, provenance, summarise
from bench.official import official_attention, official_selection
from ocvtp_kernels.selection import select_tokens
from ocvtp_kernels.slot_attention import slot_attention
from tests.conftest import SMALL, make_pruner, relative_error


def test_official_dataflow_computes_the_method() -> None:
    pruner = make_pruner()
    x, slots = torch.randn(2, 60, SMALL.in_dim), torch.randn(1, 12, SMALL.slot_dim)
    attention = official_attention(x, slots, pruner.weights())
    assert relative_error(attention, slot_attention(x, slots, pruner.weights())[1]) <= 1e-6
    received = torch.rand(2, 60)
    for keep in (12, 20, 60):
        indices, _ = select_tokens(attention, keep, received)
        for image in range(2):
            host = official_selection(attention[image : image + 1], received[image], keep)
            assert indices[image].tolist() == host


def test_rows_pass_their_gate_and_hold_both_timings() -> None:
    row = bench_pruner.measure_forward(make_pruner(), 2, 60, 12, seconds=0.0)
    assert row["shape"] == {"B": 2, "N": 60, "K": 12}
    assert row["official"]["calls"] == row["ocvtp"]["calls"] >= 5
    assert row["speedup"] == row["official"]["median"] / row["ocvtp"]["median"]
    row = bench_pruner.measure_selection(60, 20, seconds=0.0)
    assert row["distinct_picks"] < 20  # slots collide, so the budget must be filled


def test_no_figure_without_a_green_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_pruner, "official_selection", lambda *_: [0])
    with pytest.raises(SystemExit, match="gate failed"):
        bench_pruner.measure_forward(make_pruner(), 1, 60, 12, seconds=0.0)


def test_interleaving_and_summary() -> None:
    order: list[str] = []
    timings = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0, least=3
    )
    assert order == ["a", "b"] * 4  # one untimed round, three timed ones
    assert timings["a"].calls == 3
    timing = summarise([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (timing.median, timing.p20, timing.p80) == pytest.approx((3.0, 1.8, 4.2))


def test_provenance_names_what_a_figure_needs() -> None:
    record = provenance()
    assert {"date", "commit", "device", "threads", "python", "torch"} <= record.keys()
    assert all(record.values())
