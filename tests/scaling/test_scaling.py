"""Curves of cost, rehearsed in small: their laws, their gates, their files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.micro.gates import GateError
from bench.scaling import __main__ as command
from bench.scaling import sweeps
from bench.scaling.fit import power_law
from bench.scaling.limits import LIMITS, limits
from bench.scaling.points import curve, point
from bench.scaling.sizes import CPU, GPU, Scale, small_llava, small_qwen
from ocvtp import OCPruner

DEVICE = torch.device("cpu")


def small(side: int = 336, layers: int = 1) -> Any:
    config = small_llava(side, 1)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_key_value_heads = (
        64,
        64,
        2,
        2,
    )
    text.head_dim = 32
    vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size = 4, 64, 64
    vision.num_attention_heads = 2
    return config


def small_video() -> Any:
    config = small_qwen()
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = 1, 128, 64
    text.num_attention_heads, text.num_key_value_heads = 2, 1
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 3, 64, 64, 2
    vision.fullatt_block_indexes, vision.out_hidden_size = [2], 128
    return config


TINY = dataclasses.replace(
    CPU,
    llava=small,
    qwen=small_video,
    tokens=(144, 256, 400),
    kept=(16, 64),
    wide=256,
    batches=(1, 2),
    sides=(168, 336, 504),
    images=(1, 2),
    frames=(2, 4),
    budgets=(16, 64),
    seconds=0.0,
)


def test_a_power_law_is_found() -> None:
    fit = power_law([(x, 3.0 * x**1.5) for x in (1, 2, 4, 8, 16)])
    assert fit is not None
    assert (fit.exponent, fit.r2) == pytest.approx((1.5, 1.0))
    assert (fit.first, fit.last) == (4, 16)


def test_constant_costs_don_t_bend_it() -> None:
    """The upper half tells the exponent, which the smallest points would hide."""
    fit = power_law([(x, 100.0 + x**2) for x in (1, 2, 4, 8, 64, 256, 1024, 4096)])
    assert fit is not None
    assert 1.9 < fit.exponent <= 2.0
    assert fit.r2 > 0.999


def test_no_law_through_too_little() -> None:
    assert power_law([(1, 1.0), (2, 2.0)]) is None
    assert power_law([(1, 0.0), (2, 0.0), (4, 0.0)]) is None
    assert power_law([(2, 1.0), (2, 2.0), (2, 3.0)]) is None


def test_a_point_counts_and_times_everybody() -> None:
    a, b = torch.randn(64, 32), torch.randn(32, 16)
    found = point(64, {"one": lambda: a @ b, "two": lambda: (a @ b, a @ b)}, DEVICE, 0.0)
    assert [found[name]["flops"] for name in ("one", "two")] == [2 * 64 * 32 * 16, 4 * 64 * 32 * 16]
    assert found["two"]["peak_bytes"] >= 2 * 64 * 16 * 4 > found["one"]["peak_bytes"] >= 64 * 16 * 4
    assert found["one"]["ms"]["calls"] == found["two"]["ms"]["calls"] >= 3
    nothing = point(1, {"sort": lambda: a.sort()}, DEVICE, 0.0)["sort"]
    assert nothing["flops"] is None
    drawn = curve("sort", "rows", {}, [nothing] * 3)
    assert drawn["fits"]["flops"] is None


def test_the_scales_are_what_is_promised() -> None:
    for scale in (CPU, GPU):
        assert (min(scale.tokens), max(scale.tokens)) == (144, 16384)
        assert max(scale.images) >= 8
        assert max(scale.frames) >= 32
    assert GPU.llava().text_config.num_hidden_layers == 32
    assert GPU.llava(side=84).image_seq_length == 36
    assert GPU.qwen().model_type == "qwen2_5_vl"


def start(folder: Path, *extra: str) -> int:
    return command.main(["--record", "--device", "cpu", "--results", str(folder), "--commit", "abc", *extra])


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Scale:
    monkeypatch.setattr(command, "CPU", TINY)
    return TINY


@pytest.mark.usefixtures("tiny")
def test_everything_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(tmp_path, "--minutes", "0") == 3
    (path,) = tmp_path.glob("*/scaling.json")
    first = json.loads(path.read_text())
    assert [one["axis"] for one in first["sweeps"]] == ["tokens"]
    assert start(tmp_path) == 0
    record = json.loads(path.read_text())
    assert record["sweeps"][0] == first["sweeps"][0]
    assert [(one["what"].partition(",")[0], one["axis"]) for one in record["sweeps"]] == [
        ("pruner", "tokens"),
        ("pruner", "kept tokens"),
        ("pruner", "images in a batch"),
        *[
            ("time to first token", axis)
            for axis in ("tokens", "images per prompt", "kept tokens", "frames")
            for _ in "12"
        ],
    ]
    for one in record["sweeps"]:
        xs = [each["x"] for each in one["points"]]
        assert xs == sorted(set(xs))
        assert all(each["flops"] > 0 and each["peak_bytes"] > 0 for each in one["points"])
    by_tokens = [one for one in record["sweeps"] if one["axis"] == "tokens"]
    assert [each["x"] for each in by_tokens[1]["points"]] == [36, 144, 324]
    assert 0.5 < by_tokens[0]["fits"]["flops"]["exponent"] < 1.0
    rows = json.loads(path.with_name("limits.json").read_text())["rows"]
    assert [row["what"] for row in rows] == [limit.what for limit in LIMITS]
    assert all(row["speedup"] > 0 for row in rows)
    monkeypatch.setattr("bench.scaling.sweeps.point", lambda *_: pytest.fail("measured again"))
    assert start(tmp_path) == 0


@pytest.mark.usefixtures("tiny")
def test_no_curve_of_a_wrong_pruner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "official_selection", lambda attention, received, keep: list(range(keep)))
    with pytest.raises(SystemExit, match=r"gate failed: pruner at \[1, 144, 1024\], keep 64"):
        start(tmp_path)
    assert not list(tmp_path.glob("*/*.json"))


def test_no_limit_of_a_wrong_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> None:
        raise GateError("other tokens")

    monkeypatch.setattr("bench.scaling.limits.check_model", wrong)
    with pytest.raises(GateError, match="other tokens"):
        next(limits(TINY, DEVICE, lambda _: False))


def test_the_pruners_check_looks_at_every_token() -> None:
    pruner = OCPruner().eval()
    x, received = torch.randn(1, 100, 1024), torch.rand(1, 100)
    sweeps._check(pruner, x, received, 8)
    want = pruner(x, keep=8, fill_scores=received).indices

    class Wrong:
        config = pruner.config
        initial_slots = pruner.initial_slots
        weights = pruner.weights

        def __call__(self, *_: Any, **__: Any) -> Any:
            other = next(i for i in range(100) if i not in want)
            return type("S", (), {"indices": torch.cat([want[:, 1:], torch.tensor([[other]])], dim=1)})

    with pytest.raises(GateError, match=r"87\.5% of the official tokens"):
        sweeps._check(Wrong(), x, received, 8)  # type: ignore[arg-type]
