"""More of what every family has to pass: budgets and rules by hand, first tokens, copies, refusals."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import StaticCache

import ocvtp
from ocvtp import OCPruner, methods
from ocvtp.vlm.call.handover import route_of
from ocvtp.vlm.call.weighing import Weights, attentions_of
from tests.vlm.family import Family, Inputs, by_hand, families, made
from tests.vlm.skips import needs_mm_route, needs_original
from tests.vlm.tiny_llava import GREEDY, PLAIN

NEW = GREEDY["max_new_tokens"]
FAMILIES = families()
CASES = pytest.mark.parametrize("family", [pytest.param(family, id=family.name) for family in FAMILIES])


@functools.cache
def _rows(family: Family) -> dict[str, Inputs]:
    return family.rows()


def fresh(family: Family) -> Any:
    return copy.deepcopy(made(family))


def images_of(family: Family) -> dict[str, Inputs]:
    return {kind: row for kind, row in _rows(family).items() if kind != "text"}


@torch.no_grad()
def logits(model: Any, inputs: Inputs) -> torch.Tensor:
    return model(**inputs).logits


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


class Chooser:
    """Stands in for a pruner in hand-built prompts, with a rule of its own about how many and which."""

    def __init__(
        self, pruner: OCPruner, choose: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
    ) -> None:
        self.config = pruner.config
        self._choose = choose

    def __call__(self, features: torch.Tensor, keep: int, *, fill_scores: torch.Tensor) -> Any:
        return SimpleNamespace(indices=self._choose(features, fill_scores, keep))


@torch.no_grad()
def hand(family: Family, chooser: Any, inputs: Inputs, positions: str) -> torch.Tensor:
    return by_hand(family, made(family), chooser, inputs, family.keep, positions, {})


@CASES
def test_the_first_token_is_that_of_the_hand_built_prompt(family: Family) -> None:
    for positions in family.positions:
        if positions == "original" and not family.mrope:
            needs_original()
        model, pruner = fresh(family), family.pruner()
        ocvtp.apply(model, pruner, keep=family.keep, positions=positions, **PLAIN)
        for row in images_of(family).values():
            want = hand(family, pruner, row, positions)[:, -1]
            out = model.generate(
                **row, do_sample=False, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
            )
            same(out.logits[0], want)
            assert out.sequences[0, -1] == want.argmax()
        text = _rows(family)["text"]
        assert torch.equal(logits(model, text), logits(made(family), text))


@CASES
def test_numberings_differ(family: Family) -> None:
    model, pruner, row = fresh(family), family.pruner(), _rows(family)["two"]
    if family.mrope:
        with pytest.raises(ValueError, match="three dimensions"):
            ocvtp.apply(model, pruner, keep=family.keep, positions="compact")
        return
    needs_original()
    found = []
    for positions in family.positions:
        assert ocvtp.apply(model, pruner, keep=family.keep, positions=positions).positions == positions
        found.append(logits(model, row))
    assert not torch.allclose(found[0][:, -1], found[1][:, -1], atol=1e-2)


@CASES
def test_left_padded_forward_equals_its_rows(family: Family) -> None:
    model = fresh(family)
    for positions in family.positions:
        if positions == "original" and not family.mrope:
            needs_original()
        ocvtp.apply(model, family.pruner(), keep=family.keep, positions=positions)
        together = logits(model, family.batch())
        for i, row in enumerate(_rows(family).values()):
            alone = logits(model, row)[0]
            same(together[i, -len(alone) :], alone)


@CASES
def test_the_attention_rule_keeps_what_receives_most(family: Family) -> None:
    def highest(features: torch.Tensor, scores: torch.Tensor, keep: int) -> torch.Tensor:
        return scores.topk(keep).indices.sort().values

    chooser = Chooser(family.pruner(), highest)
    want = {kind: hand(family, chooser, row, family.positions[0]) for kind, row in images_of(family).items()}
    model = fresh(family)
    ocvtp.apply(model, "attention", keep=family.keep, **PLAIN)
    for kind, row in images_of(family).items():
        same(logits(model, row), want[kind])


@pytest.mark.parametrize("rounds", [0, 2])
@CASES
def test_the_farthest_point_rule_keeps_features_least_alike(family: Family, rounds: int) -> None:
    def unlike(features: torch.Tensor, scores: torch.Tensor, keep: int) -> torch.Tensor:
        return methods.k_medoids(features, keep, rounds=rounds).indices

    model = fresh(family)
    report = ocvtp.apply(model, "farthest_point", keep=family.keep, refine=rounds, **PLAIN)
    assert "farthest_point" in str(report)
    assert ("2 rounds" in str(report)) == (rounds == 2)
    layer = SimpleNamespace(config=SimpleNamespace(layer=report.read_layer))
    chooser = Chooser(layer, unlike)  # type: ignore[arg-type]
    for row in images_of(family).values():
        same(logits(model, row), hand(family, chooser, row, family.positions[0]))
    assert ocvtp.apply(model, keep=family.keep, **PLAIN).selector == "greedy_dpp"  # where no pruner is given
    with ocvtp.pruned(model, keep=family.keep, **PLAIN) as inside:
        assert inside.selector == "greedy_dpp"
    with pytest.raises(ValueError, match="refine needs features"):
        ocvtp.apply(model, "grid", keep=family.keep, refine=1, **PLAIN)


def test_rounds_after_farthest_points_run_on_the_backend_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(x: torch.Tensor, indices: torch.Tensor, rounds: int, *, backend: str) -> torch.Tensor:
        asked.append((rounds, backend))
        return indices

    monkeypatch.setattr("ocvtp_kernels.coverage.refine", noted)
    family = FAMILIES[0]
    model, row = fresh(family), images_of(family)["one"]
    ocvtp.apply(model, "farthest_point", keep=family.keep, refine=2, backend="torch")
    logits(model, row)
    assert set(asked) == {(2, "torch")}


@pytest.mark.parametrize("options", [{}, {"frames": "all"}])
@pytest.mark.parametrize("family", [pytest.param(each, id=each.name) for each in FAMILIES if each.mrope])
def test_the_grid_rule_knows_the_shape_of_an_image(family: Family, options: Inputs) -> None:
    """Images that are no squares; frames chosen from together lie below one another."""
    shapes = {24: (4, 6), 9: (3, 3), 10: (2, 5), 12: (3, 4), 36: (9, 4)}

    def spread(features: torch.Tensor, scores: torch.Tensor, keep: int) -> torch.Tensor:
        return methods.grid(features, keep, shape=shapes[features.shape[1]]).indices

    chooser, model = Chooser(family.pruner(), spread), fresh(family)
    ocvtp.apply(model, "grid", keep=family.keep, **options, **PLAIN)
    for row in images_of(family).values():
        numbering = family.positions[0]
        want = by_hand(family, made(family), chooser, row, family.keep, numbering, options)
        same(logits(model, row), want)


@pytest.mark.parametrize("share", [0.3, 0.001])
@CASES
def test_a_share_of_each_image(family: Family, share: float) -> None:
    pruner = family.pruner()

    def part(features: torch.Tensor, scores: torch.Tensor, keep: int) -> torch.Tensor:
        count = max(1, round(share * features.shape[1]))
        return pruner(features, keep=count, fill_scores=scores).indices

    chooser = Chooser(pruner, part)
    want = {kind: hand(family, chooser, row, family.positions[0]) for kind, row in images_of(family).items()}
    model = fresh(family)
    ocvtp.apply(model, pruner, keep=share, **PLAIN)
    for kind, row in images_of(family).items():
        same(logits(model, row), want[kind])


@CASES
def test_as_few_as_cover_an_image(family: Family) -> None:
    pruner, budgets = family.pruner(), [2, 3, family.keep + 1]
    errors: list[float] = []
    kept: list[int] = []

    def measure(features: torch.Tensor, scores: torch.Tensor, keep: int) -> torch.Tensor:
        selection = pruner(features, keep=3, fill_scores=scores, coverage=True)
        assert selection.coverage is not None
        errors.append(float(selection.coverage))
        return selection.indices

    def enough(features: torch.Tensor, scores: torch.Tensor, keep: int) -> torch.Tensor:
        for count in budgets:
            if count >= features.shape[1]:
                return torch.arange(features.shape[1])[None]
            selection = pruner(features, keep=count, fill_scores=scores, coverage=True)
            assert selection.coverage is not None
            if float(selection.coverage) <= most:
                break
        kept.append(selection.indices.shape[1])
        return selection.indices

    rows, positions = images_of(family), family.positions[0]
    for row in rows.values():
        hand(family, Chooser(pruner, measure), row, positions)
    errors.sort()
    most = (errors[0] + errors[1]) / 2  # one image is covered well enough by three, the others are not
    want = {kind: hand(family, Chooser(pruner, enough), row, positions) for kind, row in rows.items()}
    assert len(set(kept)) > 1
    model = fresh(family)
    try:
        ocvtp.apply(model, pruner, keep="auto", max_error=most, budgets=budgets, **PLAIN)
    except ValueError as refusal:
        if "different numbers of tokens" not in str(refusal):
            raise
        pytest.skip(str(refusal))
    for kind, row in rows.items():
        same(logits(model, row), want[kind])


@CASES
def test_sampling_keeps_the_random_stream(family: Family) -> None:
    model = fresh(family)
    # transformers < 5.18 hands copies of a row the wrong images where rows of a batch have several.
    inputs = family.batch() if route_of(model) == "mm_encoder_outputs" else _rows(family)["one"]

    def drawn() -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(**inputs, do_sample=True, num_return_sequences=2, max_new_tokens=5)

    want = drawn()
    ocvtp.apply(model, family.pruner(), keep=1.0)
    assert torch.equal(drawn(), want)
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    assert drawn().shape == want.shape
    assert logits(model, inputs).shape[1] < inputs["input_ids"].shape[1]  # it may say the same


@CASES
def test_an_assistant_of_the_family_equals_greedy(family: Family) -> None:
    needs_mm_route()
    model, assistant, row = fresh(family), fresh(family), _rows(family)["two"]
    with torch.no_grad():  # another that often agrees
        assistant.lm_head.weight.add_(0.02 * torch.randn(assistant.lm_head.weight.shape))
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    want = model.generate(**row, **GREEDY)
    for patched in (False, True):
        if patched:
            ocvtp.apply(assistant, family.pruner(), keep=family.keep)
        assert torch.equal(model.generate(**row, **GREEDY, assistant_model=assistant), want)


@CASES
@torch.no_grad()
def test_a_decode_step_compiles_into_one_graph(family: Family) -> None:
    model, row = fresh(family), _rows(family)["one"]
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    want = model.generate(**row, **GREEDY)
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    out = model(**row, past_key_values=cache, use_cache=True)
    position = torch.tensor([[out.logits.shape[1]]])
    if family.mrope:
        position = (position + model.model.rope_deltas).expand(3, 1, 1)
    note = cache.__dict__.pop("_ocvtp_note")  # as inside generate, which counts short columns
    cache._ocvtp_weights = Weights(note.bias, None)
    got = []
    for i in range(NEW):
        token = out.logits[:, -1:].argmax(-1)
        got.append(token)
        out = step(input_ids=token, past_key_values=cache, position_ids=position + i, use_cache=True)
    assert torch.equal(torch.cat(got, dim=1), want[:, -NEW:])
    torch._dynamo.reset()


@CASES
def test_nothing_is_left_on_any_module(family: Family) -> None:
    model, row = fresh(family), _rows(family)["two"]
    want = logits(model, row), model.generate(**row, **GREEDY)
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    model.generate(**row, **GREEDY)
    for name, module in model.named_modules():  # threads share them
        around = int(module is model.model)  # for calls that go around ours; holds nothing of a call
        weighed = int(any(module is one for one in attentions_of(model)))  # nor does that
        assert len(module._forward_hooks) == hooks[name] + around
        assert len(module._forward_pre_hooks) == around + weighed
    ocvtp.remove(model)
    for name, module in model.named_modules():
        assert set(module.__dict__) == before[name]
        assert len(module._forward_hooks) == hooks[name]
        assert not module._forward_pre_hooks
    assert torch.equal(logits(model, row), want[0])
    assert torch.equal(model.generate(**row, **GREEDY), want[1])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@CASES
def test_copies_and_loaded_models(family: Family, tmp_path: Path) -> None:
    model, row = fresh(family), _rows(family)["one"]
    config = model.config.to_dict()
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    want = logits(model, row)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.neg_()
    assert not torch.allclose(logits(twin, row), want, atol=1e-2)
    assert torch.equal(logits(model, row), want)
    ocvtp.remove(twin)
    assert logits(twin, row).shape[1] == row["input_ids"].shape[1]
    assert torch.equal(logits(model, row), want)
    assert model.config.to_dict() == config
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert logits(loaded, row).shape[1] == row["input_ids"].shape[1]
    ocvtp.apply(loaded, family.pruner(), keep=family.keep)
    same(logits(loaded, row), want)


@CASES
def test_report(family: Family) -> None:
    model = fresh(family)
    report = ocvtp.apply(model, family.pruner(), keep=family.keep)
    assert (report.family, report.unit, report.read_layer) == (family.name, family.unit, family.layer)
    assert (report.route, report.positions) == (route_of(model), family.positions[0])
    text = str(report)
    for part in (f"ocvtp on {family.name}", str(family.keep), f"reads layer {family.layer}", report.route):
        assert part in text
    ocvtp.apply(model, "grid", keep=family.keep)
    assert "grid" in str(ocvtp.apply(model, "grid", keep=0.25))
    assert "25.0%" in str(ocvtp.apply(model, "grid", keep=0.25))


@CASES
def test_a_layer_that_comes_too_late(family: Family) -> None:
    model = fresh(family)
    deepest = max(ocvtp.apply(model, "grid", keep=2).consumed_layers)
    ocvtp.remove(model)
    late = deepest + 1
    with pytest.raises(ValueError, match=rf"layer {late}, which must not be beyond .*ocvtp features .*train"):
        ocvtp.apply(model, family.pruner(layer=late), keep=family.keep)
    assert "forward" not in model.__dict__
    ocvtp.apply(model, family.pruner(layer=deepest), keep=family.keep)
