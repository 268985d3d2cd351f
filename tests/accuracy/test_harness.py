"""The accuracy benchmark on a small untrained model: what it counts, what stops it, what it writes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.accuracy import __main__ as command
from bench.accuracy import gate, guess, measure, relation, selectors, testset
from bench.accuracy.answers import correct
from bench.accuracy.blind import Blind
from bench.accuracy.cases import Case, cases
from bench.accuracy.report import picture, tables
from bench.accuracy.selectors import Selector, in_consumed, ours, ours_consumed, ours_name, rivals
from bench.accuracy.standing import MODES, Standing
from bench.testbed.examples import example
from bench.testbed.language import VOCABULARY, build_processor
from bench.testbed.model import Size, build
from bench.testbed.network import answer
from bench.testbed.questions import Question
from ocvtp import OCPruner, PrunerConfig
from ocvtp_kernels.selection import gather_tokens

SIZE = Size(width=48, layers=3, heads=3, text_width=32, text_layers=2, text_heads=2)
LAYER = 1


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return build(SIZE).eval()


@pytest.fixture(scope="module")
def test(model: Any) -> testset.TestSet:
    return testset.build(model, VOCABULARY, "test", 6, 5, [LAYER])


@pytest.fixture(scope="module")
def pruner() -> OCPruner:
    torch.manual_seed(1)
    return OCPruner(
        PrunerConfig(in_dim=48, hidden_dim=96, slot_dim=24, ffn_dim=48, layer=LAYER, decoder_layers=0)
    ).eval()


def test_the_tower_is_seen_as_the_model_sees_it(model: Any, test: testset.TestSet) -> None:
    pixels = test.batch(0, 6).pixels
    with torch.no_grad():
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(test.layers[LAYER], states[LAYER + 1][:, 1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(test.tokens, states[-1][:, 1:], rtol=1e-5, atol=1e-5)
    assert test.consumed == 2
    assert test.received.shape == (6, 256)


def test_all_tokens_kept_is_nothing_pruned(model: Any, test: testset.TestSet) -> None:
    standing = Standing(model, test, torch.arange(256).expand(6, -1))
    everything = test.batch(0, 6)
    with torch.no_grad():
        unpruned = answer(model, test.projected, everything)
        for mode in MODES:
            rows, bias = standing.seen(mode)
            assert bias is None or not bias.any()
            torch.testing.assert_close(answer(model, rows, everything, bias), unpruned, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(correct(model, test, rows, bias), correct(model, test))


def test_questions_are_judged_one_by_one(model: Any, test: testset.TestSet) -> None:
    """In the order of the pictures and their questions."""
    kept = rivals(LAYER)[1].choose(test, 20, 0)
    batch = test.batch(0, 6)
    with torch.no_grad():
        tokens = model.model.multi_modal_projector(gather_tokens(test.tokens, kept))
        said = said_for(model, tokens, batch)
    right = correct(model, test, *Standing(model, test, kept).seen("plain"))
    assert len(right) == len(test.kinds) == len(test.picture_of) == len(test.radii()) == 30
    truth = [VOCABULARY[question.answer] for one in test.examples for question in one.questions]
    np.testing.assert_array_equal(right, np.array(said) == np.array(truth))


def said_for(model: Any, tokens: torch.Tensor, batch: Any) -> list[int]:
    row, column = batch.answers.T
    return answer(model, tokens, batch)[row, column].argmax(-1).tolist()


def test_shown_is_what_is_on_the_kept_patches(test: testset.TestSet) -> None:
    nothing_kept_but = torch.tensor([[17]] * 6)
    for one, found in zip(
        test.examples, np.split(test.shown(nothing_kept_but), range(5, 30, 5)), strict=True
    ):
        pixels = one.owner[8:16, 8:16]
        counts = [(pixels == i).sum() for i in range(len(one.scene.things))]
        on = {int(np.argmax(counts))} if max(counts) >= 4 else set()
        assert found.tolist() == [shows(question, on) for question in one.questions]
    about = test.asked_about_things()
    assert 0 < about.sum() < len(about)
    np.testing.assert_array_equal(test.shown(torch.arange(256).expand(6, -1)), about)


def shows(question: Question, on: set[int]) -> bool:
    """Of several things whose existence is asked for, one is enough."""
    if question.kind == "existence":
        return any(target in on for target in question.targets)
    return len(question.targets) > 0 and all(target in on for target in question.targets)


def test_every_selector_keeps_as_many_of_every_picture(test: testset.TestSet, pruner: OCPruner) -> None:
    for selector in [*rivals(LAYER), *ours({"one": pruner})]:
        for seed in range(min(2, selector.seeds)):
            kept = selector.choose(test, 13, seed)
            assert kept.shape == (6, 13)
            assert (kept.diff(dim=1) > 0).all(), selector.name
    draws = [rivals(LAYER)[0].choose(test, 13, seed) for seed in (0, 1)]
    assert not torch.equal(*draws)


def test_refinement_lowers_the_coverage_error(test: testset.TestSet, pruner: OCPruner) -> None:
    everything = np.ones(30)
    found = [
        row.coverage_read
        for row in measure.rows(build(SIZE).eval(), test, ours({"one": pruner}), LAYER, everything)
        if (row.percent, row.mode) == (11, "plain")
    ]
    assert len(found) == len(selectors.ROUNDS)
    assert all(a is not None and b is not None and a >= b for a, b in itertools.pairwise(found))
    assert found[0] != found[1]


def test_the_gate_passes_the_product_and_stops_a_wrong_selection(
    model: Any, test: testset.TestSet, pruner: OCPruner
) -> None:
    processor = build_processor(SIZE.side, SIZE.patch)
    published = ours({"one": pruner})[0]
    assert gate.check(model, processor, test, [Case(published, pruner, 13)]) == 30
    torch.manual_seed(7)
    sharp = build(SIZE).eval()  # an untrained model says one word to everything; this one looks
    with torch.no_grad():
        for parameter in sharp.model.multi_modal_projector.parameters():
            parameter.mul_(60)
    seen = testset.build(sharp, VOCABULARY, "test", 6, 5, [LAYER])
    shuffled = Selector("shuffled", lambda t, keep, seed: published.choose(t, keep, seed).roll(1, 0))
    assert gate.check(sharp, processor, seen, [Case(published, pruner, 5, mode) for mode in MODES]) == 150
    with pytest.raises(gate.GateError, match=r"shuffled at 5, plain: .* of 30 answers differ"):
        gate.check(sharp, processor, seen, [Case(shuffled, pruner, 5)])


def test_rows_compare_with_the_mean_of_both_trainings(
    model: Any, test: testset.TestSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "BUDGETS", (11,))
    answers = {"random": 0.0, "one": 1.0, "two": 0.0}
    said: list[str] = []

    def choose(name: str) -> Any:
        def chosen(test: testset.TestSet, keep: int, seed: int) -> torch.Tensor:
            said.append(name)
            return rivals(LAYER)[1].choose(test, keep, seed)

        return chosen

    monkeypatch.setattr(measure, "correct", lambda _model, test, *_: np.full(30, answers[said[-1]]))
    published = [Selector(ours_name(0), choose(name), group=name) for name in ("one", "two")]
    selectors = [Selector("random", choose("random")), *published]
    rows = list(measure.rows(model, test, selectors, LAYER, np.ones(30)))
    plain = [row for row in rows if row.mode == "plain"]
    assert [row.over_published for row in plain] == [(-0.5, -0.5, -0.5), None, None]
    assert [row.over_random for row in plain] == [None, (1, 1, 1), (0, 0, 0)]
    assert [row.over_everything for row in plain] == [(-1, -1, -1), (0, 0, 0), (-1, -1, -1)]


def test_rows_of_a_mode_are_compared_with_each_other(
    model: Any, test: testset.TestSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those of one selector with its plain one. Of several draws, the modes between the ends take one."""
    monkeypatch.setattr(measure, "BUDGETS", (11,))
    share = {(False, False): 0.2, (True, False): 0.4, (False, True): 0.6, (True, True): 0.8}
    projected = test.projected

    def right(_model: Any, _test: testset.TestSet, rows: torch.Tensor, bias: torch.Tensor | None) -> Any:
        merged = not bool((rows[0, 0] == projected[0]).all(-1).any())
        return np.arange(30) < 30 * share[merged, bias is not None]

    monkeypatch.setattr(measure, "correct", right)
    grid = rivals(LAYER)[1].choose
    selectors = [Selector("random", grid, seeds=3), Selector(ours_name(0), grid, modes=("plain", "both"))]
    rows = {(row.method, row.mode): row for row in measure.rows(model, test, selectors, LAYER, np.ones(30))}
    assert [mode for method, mode in rows if method == "random"] == ["plain", "merged", "weighted", "both"]
    assert [mode for method, mode in rows if method != "random"] == ["plain", "both"]
    accuracy = [row.accuracy.mean for row in rows.values()]
    assert accuracy == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.2, 0.8])
    assert [row.seeds for row in rows.values()] == [3, 1, 1, 3, 1, 1]
    over_plain = [None if row.over_plain is None else row.over_plain.mean for row in rows.values()]
    assert over_plain == [None, *(pytest.approx(each) for each in (0.2, 0.4, 0.6)), None, pytest.approx(0.6)]
    assert rows[ours_name(0), "both"].over_random == (0, 0, 0)
    assert rows["random", "both"].over_published == (0, 0, 0)
    assert rows["random", "merged"].over_published is None  # ours was not measured so
    assert rows["random", "both"].coverage_read == rows["random", "plain"].coverage_read


def test_copies_that_stand_for_each_other_are_answered_about_as_all(
    model: Any, test: testset.TestSet
) -> None:
    """16 tokens 16 times over, kept once each with the logarithm of 16: exact where positions are equal and
    image tokens look at no other; so all queries that matter are the text's.
    """
    distinct = test.projected[:, :16]
    copies = distinct.repeat(1, 16, 1)
    seen = dataclasses.replace(test, projected=copies)
    rows, bias = Standing(model, seen, torch.arange(16).expand(6, -1)).seen("both")
    torch.testing.assert_close(rows, distinct)
    torch.testing.assert_close(bias, torch.full((6, 16), 16.0).log())
    batch = dataclasses.replace(test.batch(0, 6), stretch=torch.zeros(6))  # all picture tokens in one place
    with torch.no_grad():
        shallow = copy.deepcopy(model)  # of one layer: what picture tokens saw of each other does not matter
        del shallow.model.language_model.layers[1:]
        every = answer(shallow, copies, batch)
        kept = answer(shallow, rows, batch, bias)
        unweighted = answer(shallow, rows, batch)
    torch.testing.assert_close(kept, every, rtol=1e-4, atol=1e-5)
    assert (unweighted - every).abs().max() > 10 * (kept - every).abs().max()


def test_a_bias_reaches_whoever_looks_and_nobody_else(model: Any, test: testset.TestSet) -> None:
    """One as good as infinitely negative: as if the token were not there."""
    batch = dataclasses.replace(test.batch(0, 6), stretch=torch.zeros(6))
    rows = test.projected[:, :20]
    hidden = torch.zeros(6, 20)
    hidden[:, 7] = -1e9
    without = torch.cat([rows[:, :7], rows[:, 8:]], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(
            answer(model, rows, batch, hidden), answer(model, without, batch), rtol=1e-4, atol=1e-5
        )


def test_rows_compare_with_random_on_the_same_questions(
    model: Any, test: testset.TestSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two selectors that are one: no difference, and an interval of no width."""
    monkeypatch.setattr(measure, "BUDGETS", (11,))
    grid = rivals(LAYER)[1]
    twins = [Selector("random", grid.choose), Selector("another", grid.choose)]
    rows = measure.rows(model, test, twins, LAYER, np.ones(30))
    first, second = (row for row in rows if row.mode == "both")
    assert first.over_random is None
    assert second.over_random == (0, 0, 0)
    assert second.accuracy == first.accuracy
    assert first.keep == 28
    weighted = sum(first.kinds[kind].mean * (test.kinds == kind).sum() for kind in set(test.kinds)) / len(
        test.kinds
    )
    assert weighted == pytest.approx(first.accuracy.mean)


def test_a_measure_that_tells_accuracy(model: Any, test: testset.TestSet) -> None:
    """Rows whose accuracy falls as the coverage error rises: a relation of 1, both ways of looking."""
    pictures = np.linspace(0.1, 0.4, 6)
    made = []
    for percent, mode, step in itertools.product(measure.BUDGETS, relation.RELATED, range(4)):
        row = measure.plain_row(test, f"{step}", np.zeros(30))
        row.percent, row.mode = percent, mode
        row.accuracy = measure.Estimate(0.9 - 0.1 * step, 0, 1)
        row.coverage_read = row.coverage_consumed = 0.2 + 0.1 * step
        row.shown = 0.5
        row.by_picture = {
            "accuracy": pictures - 0.05 * step,
            "coverage_read": pictures + 0.1 * step,
            "coverage_consumed": pictures[::-1] + 0.1 * step,
            "shown": np.full(6, 0.5) + 0.01 * (step % 2),
        }
        made.append(row)
    found = {(r.percent, r.measure): r for r in relation.relations(made) if r.mode == "both"}
    assert found[11, "coverage_read"].between == pytest.approx(1)
    assert found[11, "coverage_read"].within == pytest.approx((1, 1, 1))
    assert found[11, "coverage_consumed"].within == pytest.approx((1, 1, 1))
    assert found[11, "shown"].methods == 4


def test_from_the_command_to_the_document(
    model: Any, pruner: OCPruner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "model")
    build_processor(SIZE.side, SIZE.patch).save_pretrained(tmp_path / "model")
    pruner.save_pretrained(tmp_path / "pruner")
    late_pruner().save_pretrained(tmp_path / "late")
    document = tmp_path / "accuracy.md"
    names = ("accuracy", "unseen", "modes", "kinds", "sizes", "measures", "relations")
    document.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in names))
    monkeypatch.setattr(command, "rivals", lambda layer: rivals(layer)[:2])
    monkeypatch.setattr(gate, "check", lambda *_: 1)
    monkeypatch.setattr(selectors, "SEEDS", 2)
    monkeypatch.setattr(guess, "_PICTURES", 50)
    monkeypatch.setattr(selectors, "ROUNDS", (0, 1))
    command.main(
        [
            *("--model", str(tmp_path / "model")),
            *("--pruner", f"mine={tmp_path / 'pruner'}", "--consumed-pruner", f"mine={tmp_path / 'late'}"),
            *("--blind", str(tmp_path / "model"), "--pictures", "3", "--questions", "4", "--device", "cpu"),
            *("--record", "--results", str(tmp_path), "--document", str(document)),
            *("--picture", str(tmp_path / "accuracy.png"), "--commit", "abc"),
        ]
    )
    (file,) = tmp_path.rglob("accuracy.json")
    record = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["commit"] == "abc"
    assert {row["split"] for row in record["rows"]} == {"test", "unseen"}
    for markdown in tables(record).values():
        assert markdown in document.read_text()
    assert "ours, 1 round (mine)" in document.read_text()
    assert "words alone: a model trained so" in document.read_text()
    assert "words alone: the commonest answer" in document.read_text()
    assert {r["mode"] for r in record["rows"] if r["method"] == "ours, consumed layer"} == set(MODES)
    assert {r["mode"] for r in record["rows"] if r["method"] == "ours, 1 round"} == {"plain", "both"}
    lines = {line.get_label() for line in picture(record).axes[0].lines}
    ours_drawn = {"ours, as published (mine)", "ours, consumed layer (mine)"}
    assert lines == {"random", "uniform grid", "all tokens"} | ours_drawn


def test_a_model_without_pictures_need_not_be_asked_again(
    model: Any, test: testset.TestSet, tmp_path: Path
) -> None:
    """What the last record found is taken over, with where it is from; of other questions, nothing."""
    assert Blind.of_record(tmp_path / "accuracy.json").rows(test) == []
    (row,) = Blind(model).rows(test)
    sets = {"test": {"pictures": 6, "questions": 30}}
    record = {
        "commit": "abc",
        "date": "2026",
        "sets": sets,
        "rows": [row.to_dict(), {**row.to_dict(), "split": "unseen"}],
    }
    (tmp_path / "accuracy.json").write_text(json.dumps(record))
    again = Blind.of_record(tmp_path / "accuracy.json")
    (found,) = again.rows(test)
    assert found.to_dict() == row.to_dict()
    assert again.source == {"commit": "abc", "date": "2026"}
    assert Blind(model).source is None
    assert Blind(last={**record, "blind": {"commit": "older"}}).source == {"commit": "older"}
    sets["test"] = {"pictures": 5, "questions": 30}
    assert Blind(last=record).rows(test) == []


def late_pruner() -> OCPruner:
    """Reads what the language model reads."""
    return OCPruner(
        PrunerConfig(in_dim=48, hidden_dim=96, slot_dim=24, ffn_dim=48, layer=2, decoder_layers=0)
    ).eval()


def test_the_gate_is_given_every_selector_that_the_product_has(
    test: testset.TestSet, pruner: OCPruner
) -> None:
    selectors = [*rivals(LAYER), *ours({"one": pruner}), *ours_consumed({"one": late_pruner()})]
    found = cases(test, selectors, LAYER)
    for selector in selectors:
        at_28 = {case.mode for case in found if case.selector is selector and case.keep == 28}
        assert at_28 == (set() if selector.name == "random" else set(selector.modes)), selector.name
    for name, fill, count in (("ours", "farthest_point", 8), ("ours, as published", "attention", 7)):
        late = [case for case in found if case.selector.name == in_consumed(name)]
        assert [case.options for case in late] == [{"fill": fill}] * count
        assert all(isinstance(case.pruner, OCPruner) and case.pruner.config.layer == 2 for case in late)
        assert {case.keep for case in late} == {13, 28, 56, 84}
    dpp = [case for case in found if case.selector.name == in_consumed("greedy DPP")]
    assert {case.options["features"] for case in dpp} == {"consumed"}


def test_two_pruners_of_one_name_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Folders of runs are called after the run; those that are still alike have to be told apart."""
    assert command._named("runs/a/pruner")[0] == "a"
    with pytest.raises(SystemExit):
        command.main(["--pruner", "one/pruner", "two/one"])
    assert "two pruners have one name (one, one)" in capsys.readouterr().err


def test_what_words_alone_give_away(test: testset.TestSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guess, "_PICTURES", 300)
    large = testset.TestSet(
        "test", [example("test", i, 8) for i in range(60)], {}, 0, torch.zeros(0), torch.zeros(0), SIZE, {}
    )
    right = guess.guessed(large)
    assert len(right) == sum(len(one.questions) for one in large.examples)
    assert 0.2 < right.mean() < 0.4
    assert right[large.kinds == "existence"].mean() > right[large.kinds == "reading"].mean()


def test_pruners_of_different_layers_are_refused(model: Any, pruner: OCPruner, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    build_processor(SIZE.side, SIZE.patch).save_pretrained(tmp_path / "model")
    pruner.save_pretrained(tmp_path / "a")
    other = OCPruner(PrunerConfig(in_dim=48, hidden_dim=96, slot_dim=24, ffn_dim=48, layer=0))
    other.save_pretrained(tmp_path / "b")
    given = ["--model", str(tmp_path / "model"), "--device", "cpu", "--pruner", str(tmp_path / "a")]
    with pytest.raises(SystemExit, match="same layer"):
        command.main([*given, str(tmp_path / "b")])
    with pytest.raises(SystemExit, match="must read layer 2, as the projector does; these read \\[0\\]"):
        command.main([*given, "--consumed-pruner", str(tmp_path / "b")])
