"""Evidence on real features: what is measured, on which photographs, what is printed and written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from bench.agreement import Encoder, find_photographs
from bench.chart import Panel, chart
from bench.evidence import __main__ as command
from bench.evidence import report, rows, selectors
from bench.evidence.selectors import RIVALS, VARIANTS, Choice
from bench.evidence.views import Views
from bench.markdown import replace_blocks
from ocvtp import OCPruner, PrunerConfig, methods, metrics
from ocvtp.training.recipe import Recipe
from tests.conftest import DATA, make_pruner, relative_error

ROOT = Path(__file__).parents[1]
LAYERS, WIDTH, SIZE = 4, 48, 84  # 36 tokens
CONFIG = PrunerConfig(in_dim=WIDTH, hidden_dim=96, slot_dim=32, ffn_dim=64, layer=1)
FIXTURE = DATA / "pruner-dinov2-small"


def random_views(crops: int = 3, tokens: int = 49, seed: int = 0) -> Views:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(crops, tokens, WIDTH, generator=generator) for _ in range(2))
    return Views({1: x, 2: y}, y, torch.rand(crops, tokens, generator=generator))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, two pruners of it and a few photographs, some of which are held out."""
    folder = tmp_path_factory.mktemp("evidence")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, image_size=SIZE, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder / "encoder")
    make_pruner(CONFIG).save_pretrained(folder / "first")
    make_pruner(dataclasses.replace(CONFIG, layer=2), seed=1).save_pretrained(folder / "second")
    (folder / "first" / "training.json").write_text('{"steps": 7}')
    (folder / "photographs").mkdir()
    for seed in range(9):
        noise = torch.randint(256, (40, 60, 3), generator=torch.Generator().manual_seed(seed))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / "photographs" / f"{seed}.png")
    (folder / "evidence.md").write_text(
        "Text.\n\n" + "\n".join(f"<!-- {n} -->\nold\n<!-- /{n} -->\nkept" for n in NAMES) + "\n"
    )
    return folder


NAMES = ("coverage", "residual", "training", "remedies", "slots")


# ----------------------------------------------------------------------------------------------- command


def run(folder: Path, *more: str) -> None:
    command.main(
        [
            *("--photographs", str(folder / "photographs"), "--encoder", str(folder / "encoder")),
            *("--pruner", f"one={folder / 'first'}", f"two={folder / 'second'}"),
            *("--size", str(SIZE), "--crops", "2", *more),
        ]
    )


def test_a_record_tables_and_a_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = [
        "--results",
        folder / "results",
        "--document",
        folder / "evidence.md",
        "--picture",
        folder / "a.png",
    ]
    run(folder, "--record", *map(str, places))
    (file,) = (folder / "results").glob("*/evidence.json")
    record = json.loads(file.read_text())
    assert str(folder) not in file.read_text()
    held_out = sum(p.held_out for p in find_photographs([folder / "photographs"]))
    assert 0 < held_out < 9
    assert record["photographs"] == {"trained_on": 9 - held_out, "held_out": held_out}
    assert (record["crops"], record["tokens"], record["layer"]) == (2 * held_out, 36, 1)
    assert record["pruners"]["one"]["training"] == {"steps": 7}
    assert record["pruners"]["two"]["training"] is None
    found = [rows.Row(**row) for row in record["rows"]]
    for percent in rows.BUDGETS:
        per_budget = {(row.pruner, row.method) for row in found if row.percent == percent}
        always = {(name, method) for name in ("one", "two") for method in rows.ALWAYS}
        assert per_budget == {(None, name) for name in RIVALS} | {("one", name) for name in VARIANTS} | always
    document, printed = (folder / "evidence.md").read_text(), capsys.readouterr().out
    for table in report.tables(found, "one").values():
        assert table in document
        assert table in printed
    assert "old" not in document
    assert document.count("kept") == len(NAMES)
    with Image.open(folder / "a.png") as picture:
        assert picture.width > 800


def test_held_out_photographs_are_measured_and_the_others_gathered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured: list[Views] = []
    monkeypatch.setattr(command, "all_rows", lambda seen, *_: measured.append(seen) or [])
    monkeypatch.setattr(command, "tables", lambda *_: {})
    run(folder)
    photographs = find_photographs([folder / "photographs"])
    encoder = Encoder(folder / "encoder", 1)
    pixels = torch.cat([encoder.pixels(p.crops(SIZE, 2)) for p in photographs if p.held_out])
    states = encoder.model(pixels, output_hidden_states=True).hidden_states
    (seen,) = measured
    assert set(seen.layers) == {1, 2}
    for layer in (1, 2):
        assert relative_error(seen.layers[layer], states[layer + 1][:, 1:]) <= 1e-5
    assert relative_error(seen.consumed, states[-2][:, 1:]) <= 1e-5

    command.main(["--photographs", str(folder / "photographs"), "--training-part", str(tmp_path / "part")])
    gathered = {p.digest for p in find_photographs([tmp_path / "part"])}
    assert gathered == {p.digest for p in photographs if not p.held_out}


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--remedies three is none of the pruners one, two"):
        run(folder, "--remedies", "three")
    make_pruner().save_pretrained(tmp_path / "other")
    other = dataclasses.replace(CONFIG, in_dim=32)
    OCPruner(other).save_pretrained(tmp_path / "narrow")
    with pytest.raises(SystemExit, match="narrow reads 32 channels; the encoder has 48"):
        run(folder, "--pruner", str(tmp_path / "narrow"))
    with pytest.raises(SystemExit):
        command.main(["--photographs", str(folder / "photographs")])


# -------------------------------------------------------------------------------------------------- rows


def test_budgets_of_the_published_number_of_tokens() -> None:
    assert [rows.keep_of(percent, 256) for percent in rows.BUDGETS] == [13, 28, 56, 84]
    assert rows.keep_of(5, 4) == 1


def test_a_row_is_the_mean_over_crops_and_draws() -> None:
    seen = random_views()
    sets = torch.rand(4, 3, 49, generator=torch.Generator().manual_seed(9)).argsort(dim=2)[:, :, :5]
    counts = torch.arange(12).view(4, 3)

    def choose(views: Views, x: torch.Tensor, keep: int, seed: int) -> Choice:
        assert keep == 5
        assert torch.equal(x, seen.layers[2])
        return Choice(sets[seed], counts[seed], counts[seed] + 1)

    row = rows.measure("m", choose, seen, 1, 11, pruner="p", seeds=4, reads=2)
    each = torch.stack([metrics.coverage(seen.layers[1], kept).double().mean() for kept in sets])
    assert row.coverage_read == pytest.approx(each.mean().item())
    assert row.spread_read == pytest.approx(each.std().item())
    each = torch.stack([metrics.coverage(seen.consumed, kept).double().mean() for kept in sets])
    assert (row.coverage_consumed, row.spread_consumed) == pytest.approx(
        (each.mean().item(), each.std().item())
    )
    first = metrics.least_squares_residual(seen.consumed, sets[0])
    assert row.residual_consumed == pytest.approx(first.mean().item())
    assert row.residual_read == pytest.approx(
        metrics.least_squares_residual(seen.layers[1], sets[0]).mean().item()
    )
    assert (row.live, row.distinct) == pytest.approx((5.5, 6.5))
    assert (row.percent, row.keep, row.seeds, row.method, row.pruner) == (11, 5, 4, "m", "p")
    alone = rows.measure("m", choose, seen, 1, 11, reads=2)
    assert (alone.spread_read, alone.seeds) == (0, 1)


# --------------------------------------------------------------------------------------------- selectors


@pytest.mark.parametrize("name", [*RIVALS, *VARIANTS])
@pytest.mark.parametrize("keep", [2, 13])
def test_every_selector_keeps_what_it_may(name: str, keep: int) -> None:
    seen = random_views()
    if name in RIVALS:
        choice = RIVALS[name](seen, seen.layers[1], keep, 0)
    else:
        choice = VARIANTS[name](make_pruner(CONFIG), seen, seen.layers[1], keep, 0)
        assert choice.live is not None
        assert choice.distinct is not None
        assert ((choice.live >= 1) & (choice.distinct >= 1) & (choice.distinct <= keep)).all()
    assert choice.indices.shape == (3, keep)
    assert (choice.indices.diff(dim=1) > 0).all()


def test_the_published_row_is_what_the_pruner_keeps() -> None:
    seen, pruner = random_views(), make_pruner(CONFIG)
    choice = selectors.published(pruner, seen, seen.layers[1], 10, 3)
    selection = pruner(seen.layers[1], 10, seen.received, seed=3, return_attention=True)
    assert torch.equal(choice.indices, selection.indices)
    assert torch.equal(choice.distinct, selection.from_slots)
    owner = selection.slot_attention.argmax(dim=1)
    assert choice.live.tolist() == [len(set(row.tolist())) for row in owner]


def test_random_rows_differ_between_crops_and_seeds() -> None:
    seen = random_views(4)
    first, second = (RIVALS[selectors.RANDOM](seen, seen.layers[1], 9, seed).indices for seed in (0, 1))
    assert len({tuple(row) for row in torch.cat([first, second]).tolist()}) == 8


def test_rounds_on_what_is_consumed_help_it_most() -> None:
    seen, pruner = random_views(), make_pruner(CONFIG)
    plain, read, consumed = (
        metrics.coverage(seen.consumed, VARIANTS[name](pruner, seen, seen.layers[1], 12, 0).indices)
        for name in ("as published", "+ 3 rounds", "+ 3 rounds on what is consumed")
    )
    assert (consumed <= plain).all()
    assert consumed.mean() < read.mean()


def test_logits_are_those_of_the_attention() -> None:
    seen, pruner = random_views(), make_pruner(CONFIG)
    logits = selectors.slot_logits(pruner, seen.layers[1], 10, 3)
    attention = pruner(seen.layers[1], 10, seed=3, return_attention=True).slot_attention
    assert relative_error(logits.softmax(dim=1), attention) <= 1e-5


def test_the_token_nearest_a_slots_mean() -> None:
    """Two groups of tokens on a line: the middle one of each stands for it, whichever a slot likes most."""
    x = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])[None, :, None].repeat(1, 1, WIDTH)
    seen = Views({1: x}, x, torch.zeros(1, 6))
    attention = torch.tensor([[[0.99, 0.9, 0.9, 0.1, 0.1, 0.01], [0.01, 0.1, 0.1, 0.9, 0.9, 0.99]]])

    class Fixed:
        def __call__(self, *_: object, **__: object) -> object:
            return dataclasses.make_dataclass("S", ["slot_attention"])(attention)

    assert selectors.published(Fixed(), seen, x, 2, 0).indices.tolist() == [[0, 5]]
    assert selectors.nearest_owned_mean(Fixed(), seen, x, 2, 0).indices.tolist() == [[1, 4]]
    weighted = selectors.nearest_mean(Fixed(), seen, x, 2, 0).indices.tolist()
    assert weighted == [[2, 3]]  # a tenth of each slot is with the other group
    uncovered = selectors.fill_uncovered(Fixed(), seen, x, 3, 0).indices.tolist()
    assert uncovered == [[0, 2, 5]]


def test_best_of_seeds_is_best_for_every_image() -> None:
    seen, pruner = random_views(), make_pruner(CONFIG)
    x = seen.layers[1]
    best = metrics.coverage(x, selectors.best_seed(3)(pruner, seen, x, 9, 0).indices)
    each = [metrics.coverage(x, selectors.published(pruner, seen, x, 9, s).indices) for s in range(3)]
    assert torch.equal(best, torch.stack(each).amin(dim=0))


# ------------------------------------------------------------------------------------- tables and pictures


def test_blocks_are_replaced_and_missing_ones_named() -> None:
    text = "a <!-- x -->1<!-- /x --> b"
    assert replace_blocks(text, {"x": "2"}) == "a <!-- x -->\n\n2\n\n<!-- /x --> b"
    for broken in ("a", "<!-- x --> 1", "<!-- /x -->"):
        with pytest.raises(ValueError, match="no place for 'x'"):
            replace_blocks(broken, {"x": "2"})


def test_a_chart_shows_every_line() -> None:
    lines = {f"line {i}": [(0.0, float(i)), (1.0, float(i + 1))] for i in range(5)}
    figure = chart([Panel("a", lines), Panel("b", dict(reversed(lines.items())))], "x", "y", [0, 1])
    first, second = ({line.get_label(): line for line in axes.lines} for axes in figure.axes)
    assert first.keys() == second.keys() == lines.keys()
    for name, points in lines.items():
        assert list(zip(*first[name].get_data(), strict=True)) == points
        assert first[name].get_color() == second[name].get_color()
    assert len({line.get_color() for line in first.values()}) == 5
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(lines)


# ------------------------------------------------------------------------------------- what is in the tree


def test_the_document_shows_the_record() -> None:
    (file,) = (ROOT / "bench" / "results").glob("*/evidence.json")
    record = json.loads(file.read_text())
    found = [rows.Row(**row) for row in record["rows"]]
    document = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    for table in report.tables(found, record["remedied"]).values():
        assert table in document
    assert (ROOT / "docs" / "evidence.png").stat().st_size < 200_000


def test_the_recipe_of_the_shipped_pruner_is_one() -> None:
    values = json.loads((ROOT / "bench" / "evidence" / "recipe.json").read_text())
    assert Recipe.from_dict(values["recipe"]).unit_variance
    config = json.loads((FIXTURE / "config.json").read_text())
    PrunerConfig.from_dict({**config, **values["pruner"]})


def test_the_shipped_pruner_beats_chance() -> None:
    stored = load_file(FIXTURE / "held-out-features.safetensors")
    x, received = stored["features"].float(), stored["received"].float()
    pruner = OCPruner.from_pretrained(FIXTURE)
    for keep in (13, 28, 56, 84):
        ours = metrics.coverage(x, pruner(x, keep, received).indices).mean()
        chance = torch.stack(
            [
                metrics.coverage(x, methods.random_tokens(x, keep, seed=100 * s).indices).mean()
                for s in range(10)
            ]
        )
        assert ours < chance.mean() - 2 * chance.std()
        assert ours < 0.97 * chance.mean()


def test_the_shipped_pruner_is_small_and_says_where_it_is_from() -> None:
    size = sum(file.stat().st_size for file in FIXTURE.iterdir())
    assert size < 10_000_000
    assert (FIXTURE / "held-out-features.safetensors").stat().st_size < 1_000_000
    assert OCPruner.from_pretrained(FIXTURE).decoder is None
    text = (FIXTURE / "README.md").read_text(encoding="utf-8")
    for said in ("commit", "seed", "licence", "opencv-doc", "dinov2-small"):
        assert said in text.lower()
