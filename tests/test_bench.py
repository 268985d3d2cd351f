"""The benchmarks' own gates and statistics."""

from __future__ import annotations

import os
import platform

import pytest
import torch

from bench import pruner as bench_pruner
from bench.harness import cpu_slug, device_slug, gpu_slug, interleaved, provenance, summarise
from bench.official import official_attention, official_received, official_rows, official_selection
from ocvtp_kernels.received_attention import received_attention
from ocvtp_kernels.selection import select_rows, select_tokens
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
    assert platform.node() not in str(record)
    assert provenance(commit="abc")["commit"] == "abc"


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100-mig-1g.10gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4"),
        ("NVIDIA GeForce RTX 4090", "geforce-rtx-4090"),
        ("AMD Instinct MI300X", "instinct-mi300x"),
        ("Tesla T4", "t4"),
    ],
)
def test_gpu_folder_names(name: str, slug: str) -> None:
    assert gpu_slug(name) == slug


@pytest.mark.parametrize(
    ("name", "cores", "slug"),
    [
        ("AMD EPYC", 2, "cpu-epyc-2-cores"),
        ("AMD EPYC 7763 64-Core Processor", 4, "cpu-epyc-7763-4-cores"),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", 32, "cpu-xeon-platinum-8375c-32-cores"),
        ("", 1, "cpu-unknown-1-cores"),
    ],
)
def test_cpu_folder_names(name: str, cores: int, slug: str) -> None:
    assert cpu_slug(name, cores) == slug


def test_folder_name_of_this_machine() -> None:
    assert device_slug(torch.device("cpu")).endswith(f"-{os.cpu_count()}-cores")


def test_official_rows_are_the_kept_tokens() -> None:
    attention, received, x = torch.rand(3, 4, 20), torch.rand(3, 20), torch.randn(3, 20, 5)
    indices, rows = official_rows(attention, received, x, 8)
    expected = select_rows(attention, 8, received, x)
    assert torch.equal(indices, expected[0])
    assert torch.equal(rows, expected[2])


def test_official_received_attention_is_the_mean_of_the_map() -> None:
    q, k = torch.randn(2, 3, 20, 16), torch.randn(2, 3, 20, 16)
    assert relative_error(official_received(q, k), received_attention(q, k)) <= 1e-6
    assert official_received(q.bfloat16(), k.bfloat16()).dtype == torch.bfloat16
    bounds = torch.tensor([0, 5, 20])
    packed = received_attention(q[:1], k[:1], cu_seqlens=bounds)
    assert relative_error(official_received(q[:1], k[:1], bounds), packed) <= 1e-6
