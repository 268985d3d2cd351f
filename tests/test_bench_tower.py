"""The tower's benchmark: its FLOP formulas, its gate, its file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import summarise
from bench.tower.encoder import ENCODERS, EncoderBench, EncoderShape
from bench.tower.qwen import QWENS, QwenBench, QwenShape
from bench.tower.report import record, show
from bench.tower.step import measure
from ocvtp.vlm.towers.clip import HeldLayer
from ocvtp.vlm.towers.qwen import QwenTowerRun

CPU = torch.device("cpu")
CLIP = EncoderShape(width=32, mlp=48, layers=4, heads=4, image=28, patch=7, class_token=True)
SIGLIP = dataclasses.replace(CLIP, class_token=False)
# Windows of 4 patches along a side of 10: the last ones are smaller.
QWEN = QwenShape(width=32, mlp=24, layers=4, heads=4, full=(1, 3), image=70, patch=7, window=28, out=20)


def make(shape: EncoderShape | QwenShape) -> EncoderBench | QwenBench:
    kind = QwenBench if isinstance(shape, QwenShape) else EncoderBench
    return kind(shape, 2, CPU, (3, 5))


def test_shapes_are_those_of_the_models() -> None:
    """Parameters and tokens of the published towers (SigLIP without its pooling head)."""
    clip, siglip, qwen = ENCODERS["clip-l-336"], ENCODERS["siglip-so400m"], QWENS["qwen2.5-vl"]
    assert (clip.tokens, clip.consumed, siglip.tokens) == (577, 22, 729)
    assert (qwen.patches, qwen.units) == (1024, 256)
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in shape.build().parameters()) for shape in (clip, siglip, qwen)]
    assert sizes == [303_507_456, 412_987_248, 676_550_144]


@pytest.mark.parametrize("shape", [CLIP, SIGLIP, QWEN], ids=["clip", "siglip", "qwen"])
def test_formulas_count_what_pytorch_counts(shape: EncoderShape | QwenShape) -> None:
    bench, counted = make(shape), {}
    # Attention as plain products, which have FLOP formulas on a CPU, too.
    with torch.inference_mode(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for step in bench.steps():
            with FlopCounterMode(display=False) as counter:
                step.run()
            counted[step.part, step.what] = counter.get_total_flops()
    assert counted == {(step.part, step.what): step.flops for step in bench.steps()}


@pytest.mark.parametrize("shape", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_every_step_does_less(shape: EncoderShape) -> None:
    rows = measure(make(shape), CPU, 0.0)
    assert [row["part"] for row in rows] == ["tower"] * 6 + ["consumed layer"] * 5
    assert all(row["ms"]["calls"] >= 3 and row["ms"]["median"] > 0 for row in rows)
    gflop = [row["gflop"] for row in rows]
    assert gflop[0] == gflop[1] > gflop[3] > gflop[2] > gflop[4] > gflop[5] > gflop[7] > gflop[8] > gflop[10]


def test_qwen_merges_less() -> None:
    rows = measure(make(QWEN), CPU, 0.0)
    assert [row["part"] for row in rows] == ["tower"] * 3 + ["after the blocks"] * 4
    gflop = [row["gflop"] for row in rows]
    assert gflop[1] > gflop[2] > gflop[4] > gflop[5] > gflop[6]
    assert gflop[1] > gflop[0]


def test_table_and_file(tmp_path: Path) -> None:
    rows = [{"part": "tower", "what": "all", "B": 1, "gflop": 2.0, "ms": summarise([1.0, 2.0]).to_dict()}]
    console = Console(record=True, width=120)
    show("tiny", [*rows, {**rows[0], "gflop": 1.0}], console)
    assert "0.500" in console.export_text()
    path = tmp_path / "device" / "tower.json"
    record(path, "one", {"rows": rows})
    record(path, "two", {"rows": []})
    record(path, "one", {"rows": []})
    assert json.loads(path.read_text()) == {"one": {"rows": []}, "two": {"rows": []}}


@pytest.mark.parametrize(
    ("shape", "of", "name", "where"),
    [
        (CLIP, HeldLayer, "rows", "tower, and the layer's end for 5 rows: rows"),
        (CLIP, HeldLayer, "received_attention", "tower, and the layer's end for 5 rows: scores"),
        (QWEN, QwenTowerRun, "merged", "tower, and scores, projected again: merged units"),
        (QWEN, QwenTowerRun, "received_attention", "tower, and scores, projected again: scores"),
    ],
)
def test_no_figure_without_a_green_gate(
    shape: EncoderShape | QwenShape, of: type, name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(of, name)
    monkeypatch.setattr(of, name, lambda *args: right(*args) * 1.001)
    with pytest.raises(SystemExit, match=f"gate failed at {where}: "):
        measure(make(shape), CPU, 0.0)
