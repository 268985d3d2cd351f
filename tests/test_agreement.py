"""Agreement with float64: what trains, what is measured, how precisions are emulated, what is printed."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from bench import agreement
from bench.agreement import Features, Photograph, RoundedProducts, compare, direct, emulated, markdown
from ocvtp import OCPruner
from ocvtp_kernels._arch import interpreting
from tests.conftest import SMALL, make_pruner, relative_error
from tests.threads import single_threaded

SIZE, LAYER, CROPS = 84, 1, 3  # 36 tokens of 32 channels


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These operations are so small that waking threads for them takes longer."""
    with single_threaded():
        yield


def photograph(path: Path, seed: int) -> Photograph:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (70, 100, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path)
    (found,) = (p for p in agreement.find_photographs([path.parent]) if p.path == path)
    return found


@pytest.fixture
def two(tmp_path: Path) -> tuple[Photograph, Photograph]:
    """One to train on and one to measure, and nothing else in their folder."""
    folder = tmp_path / "images"
    folder.mkdir()
    parts: dict[bool, Photograph] = {}
    for seed in range(100):
        made = photograph(folder / f"{seed}.png", seed)
        if parts.setdefault(made.held_out, made) is not made:
            made.path.unlink()
        if len(parts) == 2:
            break
    return parts[False], parts[True]


@pytest.fixture
def command(tmp_path: Path, two: tuple[Photograph, Photograph]) -> list[str]:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=SIZE, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path / "encoder")
    folders = ["--encoder", tmp_path / "encoder", "--images", two[0].path.parent, "--pruner", tmp_path / "p"]
    sizes = ["--layer", LAYER, "--size", SIZE, "--crops", CROPS, "--train-steps", 2, "--kernel-crops", 1]
    return [str(word) for word in (*folders, *sizes, "--device", "cpu")]


def inputs(crops: int = 3, tokens: int = 60) -> Features:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(crops, tokens, SMALL.in_dim, generator=generator)
    return Features(x, torch.rand(crops, tokens, generator=generator))


# ------------------------------------------------------------------------------------------- photographs


def test_crops_depend_on_the_content_alone(tmp_path: Path) -> None:
    first = photograph(tmp_path / "a.png", 1)
    crops = [crop.tobytes() for crop in first.crops(20, 5)]
    assert len(set(crops)) == 5
    assert [crop.tobytes() for crop in first.crops(20, 2)] == crops[:2]
    first.path.rename(tmp_path / "renamed.png")
    (again,) = agreement.find_photographs([tmp_path])
    assert [crop.tobytes() for crop in again.crops(20, 5)] == crops
    middle = Image.open(again.path).resize((20, 20), Image.Resampling.BICUBIC, (15, 0, 85, 70))
    assert crops[0] == middle.tobytes()


def test_a_photograph_keeps_its_part_whatever_is_beside_it(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    before = [photograph(tmp_path / "images" / f"{seed}.png", seed) for seed in range(12)]
    (tmp_path / "copy").mkdir()
    photograph(tmp_path / "copy" / "0.png", 0)  # the same content under another name
    photograph(tmp_path / "copy" / "z.png", 99)
    after = agreement.find_photographs([tmp_path / "copy", tmp_path / "images"])
    assert len(after) == 13
    part = {found.digest: found.held_out for found in after}
    assert all(part[found.digest] == found.held_out for found in before)
    trained_on, held_out = agreement.split(after)
    assert not {p.digest for p in trained_on} & {p.digest for p in held_out}
    assert len(trained_on) + len(held_out) == 13


def test_nothing_to_measure_is_said(tmp_path: Path, two: tuple[Photograph, Photograph]) -> None:
    with pytest.raises(SystemExit, match="1 photographs to train on and 0 to measure"):
        agreement.split([two[0]])


# ----------------------------------------------------------------------------------------------- command


def test_held_out_photographs_never_train(
    command: list[str], two: tuple[Photograph, Photograph], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def train(pruner: OCPruner, tokens: torch.Tensor, steps: int) -> list[float]:
        seen["trained on"] = tokens
        return [0.0] * steps

    def measure(pruner: OCPruner, features: Features, kernel_crops: int) -> agreement.Measured:
        seen["measured"] = features.tokens
        return agreement.Measured([], {}, {})

    monkeypatch.setattr(agreement, "train", train)
    monkeypatch.setattr(agreement, "measure", measure)
    agreement.main(command)
    encoder = agreement.Encoder(tmp_path / "encoder", LAYER)
    for part, one in zip(("trained on", "measured"), two, strict=True):
        pixels = encoder.pixels(one.crops(SIZE, CROPS))
        states = encoder.model(pixels, output_hidden_states=True).hidden_states
        assert relative_error(seen[part], states[LAYER + 1][:, 1:]) <= 1e-6


def test_a_table_a_record_and_no_second_training(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agreement.main([*command, "--record", "--results", str(tmp_path / "results")])
    printed = capsys.readouterr().out
    (file,) = (tmp_path / "results").glob("*/agreement.json")
    record = json.loads(file.read_text())
    assert {"commit", "date", "torch", "transformers"} <= set(record)
    assert (record["training"]["photographs"], record["held_out"]) == (1, 1)
    assert (record["encoder"], record["layer"], record["training"]["steps"]) == ("encoder", LAYER, 2)
    assert str(tmp_path) not in file.read_text()
    (size,) = record["sizes"]
    for row in size["rows"]:
        assert f"| {row['precision']} | 16 of 36 |" in printed
    rows = {row["precision"]: row for row in size["rows"]}
    assert rows["float32 torch"]["kept"] >= agreement.GATE
    assert rows["float32 torch"]["error"] < rows["tf32 rounding (emulated)"]["error"]
    assert rows["tf32 rounding (emulated)"]["error"] < rows["bf16 rounding (emulated)"]["error"]
    # On a CPU nothing rounds like a tensor core; that a row is missing, and why, must be read.
    assert "Triton tf32" not in rows
    assert f"No row for Triton tf32: {size['skipped']['Triton tf32']}." in printed
    assert set(rows) | set(size["skipped"]) == set(agreement.RUNS)

    monkeypatch.setattr(agreement, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(agreement, "RUNS", {agreement.TORCH: agreement.RUNS[agreement.TORCH]})
    agreement.main(command)
    again = capsys.readouterr().out
    assert again.splitlines()[:3] == printed.splitlines()[:3]
    (row,) = (line for line in printed.splitlines() if agreement.TORCH in line)
    assert row in again


def test_training_is_repeatable_and_learns() -> None:
    tokens = inputs(8, 36).tokens
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        pruner = OCPruner(agreement.pruner_config(SMALL.in_dim, LAYER, 36))
        results.append(agreement.train(pruner, tokens, 8))
    assert results[0] == results[1]
    assert sum(results[0][-3:]) < sum(results[0][:3])


def test_no_table_without_a_green_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "GATE", 1.01)
    with pytest.raises(SystemExit, match="gate failed at 16 of 60"):
        agreement.measure(make_pruner(), inputs(), 1)


# -------------------------------------------------------------------------------------------- precisions


def exactly_rounded(x: torch.Tensor, mantissa: int) -> torch.Tensor:
    """To nearest by float64 arithmetic, which holds every step of it exactly; ties away from zero."""
    fraction, exponent = torch.frexp(x.double())
    steps = 2.0 ** (mantissa + 1)
    return torch.ldexp(fraction.sign() * (fraction.abs() * steps + 0.5).floor() / steps, exponent)


def test_tf32_is_rounded_to_nearest() -> None:
    e = 2.0**-10  # the distance of TF32 numbers from 1
    known = {1.0: 1.0, 1 + e: 1 + e, 1 + e / 2: 1 + e, 1 + e / 2 - 2**-23: 1.0, 2 - 2**-23: 2.0, 0.0: 0.0}
    for value, nearest in known.items():
        for sign in (1.0, -1.0):
            assert agreement.nearest_tf32(torch.tensor([sign * value])).item() == sign * nearest
    x = torch.randn(10000, generator=torch.Generator().manual_seed(0)) * 1e3
    assert torch.equal(agreement.nearest_tf32(x).double(), exactly_rounded(x, 10))
    special = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert torch.equal(agreement.nearest_tf32(special).isnan(), special.isnan())
    assert torch.equal(agreement.nearest_tf32(special)[:2], special[:2])


def test_tf32_is_truncated_towards_zero() -> None:
    e = 2.0**-10
    x = torch.tensor([1 + e - 2**-23, -(1 + e - 2**-23), 1 + e, 2 - 2**-23])
    assert agreement.truncated_tf32(x).tolist() == [1.0, -1.0, 1 + e, 2 - e]


@pytest.mark.parametrize(("dtype", "mantissa"), [(torch.float16, 10), (torch.bfloat16, 7)])
def test_half_precisions_are_rounded_to_nearest_even(dtype: torch.dtype, mantissa: int) -> None:
    e, rounding = 2.0**-mantissa, agreement.nearest(dtype)
    known = {1 + e / 2: 1.0, 1 + 3 * e / 2: 1 + 2 * e, 1 + e / 2 + 2**-23: 1 + e, 1 + e / 2 - 2**-23: 1.0}
    for value, nearest in known.items():
        assert rounding(torch.tensor([value])).item() == nearest
    x = torch.randn(10000, generator=torch.Generator().manual_seed(0))
    x = x[x.abs() > 1e-3]  # normal numbers of float16
    ties = (exactly_rounded(x, mantissa) - x.double()).abs() * 2 == exactly_rounded(x, mantissa) * e
    assert torch.equal(rounding(x).double()[~ties], exactly_rounded(x, mantissa)[~ties])


def test_operands_of_every_product_are_rounded_and_nothing_else() -> None:
    def cut(x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, 2.0)

    x, w, bias = torch.rand(3, 5, 7), torch.rand(4, 7), torch.rand(4)
    with RoundedProducts(cut) as mode:
        assert (torch.nn.functional.linear(x, w) == 28).all()
        assert torch.equal(torch.nn.functional.linear(x, w, bias), (28 + bias).expand(3, 5, 4))
        assert (x @ x.transpose(1, 2) == 28).all()
        assert torch.equal(torch.baddbmm(x[:, :, :5], x, x.transpose(1, 2)), x[:, :, :5] + 28)
        assert mode.products == 4
        assert torch.equal(x.double() @ w.double().T, x.double() @ w.double().T)
        assert torch.equal(x + 1, torch.add(x, 1))
        vector = x @ w[0]
    assert torch.equal(vector, x @ w[0])
    assert mode.products == 4


def test_emulation_is_float32_but_for_its_rounding() -> None:
    pruner, x = make_pruner(), inputs()
    plain = direct(pruner, x, 16, backend="torch", precision="fp32")
    same = emulated(pruner, x, 16, rounding=torch.clone)
    assert torch.equal(plain.slot_attention, same.slot_attention)
    assert torch.equal(plain.indices, same.indices)
    again = direct(pruner, x, 16, backend="torch", precision="fp32")  # folded weights are as they were
    assert torch.equal(plain.slot_attention, again.slot_attention)


@pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter on the CPU")
def test_emulated_fp16_errs_like_the_kernels() -> None:
    pruner, x = make_pruner(), inputs()
    exact = direct(make_pruner().double(), Features(x.tokens.double(), x.received), 16, **TORCH)
    kernel = compare("", direct(pruner, x, 16, backend="triton", precision="fp16"), exact)
    emulation = compare("", emulated(pruner, x, 16, rounding=agreement.nearest(torch.float16)), exact)
    assert 0.4 <= emulation.error / kernel.error <= 2.5


# --------------------------------------------------------------------------------------------- agreement

TORCH = {"backend": "torch", "precision": "auto"}


def test_the_same_result_agrees_wholly_and_a_perturbed_one_less() -> None:
    pruner, x = make_pruner(), inputs()
    want = direct(pruner, x, 16, **TORCH)
    same = compare("same", want, want)
    assert (same.kept, same.identical, same.worst, same.top, same.error) == (1, 1, 1, 1, 0)
    assert markdown([same]).splitlines()[-1].count("100.00 %") == 4

    got = dataclasses.replace(want, indices=want.indices.clone(), slot_attention=want.slot_attention.clone())
    dropped = next(token for token in range(x.tokens.shape[1]) if token not in want.indices[0])
    got.indices[0, 3] = dropped
    got.slot_attention[1, 5] = got.slot_attention[1, 5].roll(1)
    row = compare("perturbed", got, want)
    assert row.kept == pytest.approx(1 - 1 / (3 * 16))
    assert row.worst == pytest.approx(15 / 16)
    assert row.identical == pytest.approx(2 / 3)
    assert row.top == pytest.approx(1 - 1 / (3 * 16))
    assert row.error > 0
    assert markdown([row]).splitlines()[-1].count("100.00 %") == 0


def test_budgets_drop_at_least_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "RUNS", {agreement.TORCH: functools.partial(direct, **TORCH)})
    measured = agreement.measure(make_pruner(), inputs(2, 130), 1)
    assert [row.keep for row in measured.rows] == [16, 64]
    assert 0 < measured.from_slots[16] <= 16
