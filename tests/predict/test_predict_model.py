"""The model's arithmetic, on counts made up for it, and what becomes of its figures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench import snapshot
from bench.predict import hopper, model, record
from bench.predict.kernel import Counts, parameters, resident
from bench.predict.model import Times
from bench.predict.sass import CLASS_NAMES
from bench.predict.steps import Mark, Operator, between
from bench.predict.targets import totals, verdicts
from bench.report import predicted
from bench.report.results import Result, Results

COUNTS = Counts(
    kernel="linear",
    variant="gelu",
    programs=132,
    warps=4,
    registers=128,
    shared=32 * 1024,
    resident=4,
    instructions={**dict.fromkeys(CLASS_NAMES, 0.0), "int": 1755.0 * 0.45},
    multiply_adds=0.0,
    half=0.0,
    l2=132 * 80e3 * 3,
    stored=0.0,
    dram=1e6,
    followed=132,
)


def test_each_limit_by_hand() -> None:
    """One program on each multiprocessor, one warp on each scheduler."""
    found = model.kernel(COUNTS, images=1)
    assert found.issue == pytest.approx(1.0)
    assert found.l2 == (pytest.approx(3.0), pytest.approx(4.0))
    assert (found.tensor, found.dram) == (0.0, 0.0)
    assert [found.total(rate) for rate in (0, 1)] == [pytest.approx(5.6), pytest.approx(6.6)]
    assert found.bound(0) == "L2"
    peak = 132 * hopper.MULTIPLY_ADDS * hopper.CLOCK * hopper.TENSOR_SHARE
    assert model.kernel(replace(COUNTS, multiply_adds=peak, half=peak), 1).tensor == pytest.approx(1.0)
    assert model.kernel(replace(COUNTS, multiply_adds=peak), 1).tensor == pytest.approx(2.0)  # TF32
    assert model.kernel(replace(COUNTS, dram=hopper.DRAM * 100), 1).total(0) == pytest.approx(102.6)


def test_the_busiest_multiprocessor_counts() -> None:
    """133 programs are two on one of them, which share its schedulers; nine are one, as 132 are."""
    l2 = COUNTS.l2 / 132
    assert model.kernel(replace(COUNTS, programs=9, l2=9 * l2), 1).work(0) == pytest.approx(3.0)
    two = model.kernel(replace(COUNTS, programs=133, l2=133 * l2), 1)
    assert two.l2[0] == pytest.approx(6.0)
    assert two.issue == pytest.approx(2 * 0.45 / 0.8)
    assert [model.issue_rate(warps) for warps in (1, 2, 3, 9)] == [0.45, 0.8, 1.0, 1.0]


def test_starts() -> None:
    assert [model.start(images, False) for images in (1, 8, 64)] == [2.6, 2.6, 1.5]
    assert [model.start(images, True) for images in (1, 64)] == [1.4, 1.4]
    assert model.kernel(replace(COUNTS, dependent=True), 1).start == 1.4


def test_phases_wait_for_each_other() -> None:
    phase = replace(COUNTS, programs=4, l2=4 * 80e3)
    found = model.phased(COUNTS, {"1 a": phase, "2 b": phase}, 1)
    assert found.total(0) == pytest.approx(2.6 + 2 * (hopper.PHASE + 1.0))
    assert found.bound(0) == "phases"
    assert record.row(found)["phases"] == {"1 a": [1.0, 1.33], "2 b": [1.0, 1.33]}


def test_operators_of_pytorch() -> None:
    product = model.operator(Operator("addmm", 1000, int(790e6), 132 * hopper.GEMM_TILE), 1)
    assert product.total(0) == pytest.approx(2.6 + 1.0)
    few = model.operator(Operator("addmm", 1000, int(790e6), 66 * hopper.GEMM_TILE), 1)
    assert few.work(0) == pytest.approx(2.0)
    copied = model.operator(Operator("copy_", int(132 * 80e3), 0, 10), 1)
    assert copied.l2 == (pytest.approx(1.0), pytest.approx(80 / 60))


def test_what_fits_on_a_multiprocessor() -> None:
    assert resident(128, 0, 4) == 4
    assert resident(111, 96 * 1024, 8) == 2
    assert resident(16, 0, 1) == 32
    assert resident(16, 0, 32) == 2
    assert resident(255, 227 * 1024, 4) == 1


def test_parameters_lie_where_the_elf_says() -> None:
    elf = """
        Attribute:      EIATTR_KPARAM_INFO
        Value:  Index : 0x0     Ordinal : 0x1   Offset  : 0x8   Size    : 0x4
        Value:  Index : 0x0     Ordinal : 0x0   Offset  : 0x0   Size    : 0x8
        Attribute:      EIATTR_PARAM_CBANK
        Format: EIFMT_SVAL
        Value:  0xe 0x580210
    """
    assert parameters(elf) == [0x210, 0x218]
    with pytest.raises(ValueError, match="don't say"):
        parameters("")


def test_steps_between_marks() -> None:
    one, two = Operator("a", 1, 0, 1), Operator("b", 1, 0, 1)
    steps = [Mark("layer"), one, Mark("layer"), two, Mark("projector"), one]
    assert between(steps, "layer", "projector") == [two]
    with pytest.raises(ValueError, match="no 'layer'"):
        between([one], "layer", "projector")


def part(us: float) -> dict:
    times = Times("linear", 2.6, us, 0.0, (us, us), 0.0, counts=replace(COUNTS, notes=("a guess",)))
    rows = record.rows([times, times, Times("copy_", 2.6, 0.0, 0.0, (1.0, 2.0), 0.0)])
    cases = {
        "B=1 N=576 K=64": {"slots": rows, "exposed": rows, "captured": rows},
        "B=64 N=576 K=64": {"slots": rows},
    }
    head = {
        "date": "2026-01-01",
        "commit": "abcdef123456",
        "triton": "3.9",
        "torch": "2.13",
        "l2_rates": [80e3, 60e3],
    }
    return {**head, "cases": cases}


def test_blocks_come_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "predict.json"
    record.write("after", part(10.0), path)
    record.write("before", part(50.0), path)
    parts = snapshot.read(path)
    assert list(parts) == ["before", "after"]
    results = Results([Result("counts", f"predict {name}", data) for name, data in parts.items()])
    text = predicted.totals_table(results)
    assert "| 109 / 110 (3 launches) | 29 / 30 (3 launches) | not predicted |" in text
    assert "a model, not a measurement" in text.lower()
    assert "| slots, B = 1, after | ≤ 75 µs | 29 µs / 30 µs | would be met |" in text
    assert "| exposed, B = 1, after | ≤ 15 µs | 29 µs / 30 µs | **would be missed** |" in text
    listed = predicted.latest_tables(results)
    assert "01, 02 linear gelu\\*" in listed
    assert "03 copy_" in listed
    assert "linear: a guess." in listed
    assert "captured" not in listed
    assert predicted.totals_table(Results([])) == predicted.NOT_PREDICTED


def test_totals_and_verdicts() -> None:
    made = part(10.0)
    assert totals(made["cases"]["B=1 N=576 K=64"]["slots"]) == (pytest.approx(28.8), pytest.approx(29.8))
    assert [(one.name, one.met) for one in verdicts(made)] == [
        ("slots, B = 1", True),
        ("slots, B = 64", True),
        ("exposed, B = 1", False),
    ]
    assert "MISSED (a model)" in list(verdicts(made))[2].said
    assert math.isclose(
        sum(row["total_us"][0] for row in made["cases"]["B=64 N=576 K=64"]["slots"].values()), 28.8
    )
