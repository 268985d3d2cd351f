"""Rules that compare features: what they run, and on how much at once."""

from __future__ import annotations

import pytest
import torch

import ocvtp
from ocvtp import methods
from ocvtp.vlm.contracts.selector import Group, Rule
from ocvtp.vlm.encode.selectors import RuleSelector
from ocvtp_kernels._arch import interpreting
from ocvtp_kernels._launch import recording
from tests.vlm.family import families
from tests.vlm.tiny_llava import llava

FEATURES = torch.randn(3, 30, 8, generator=torch.Generator().manual_seed(0))
GROUP = Group(which=(0, 1, 2), tokens=30, shape=None, keep=5)
RULES: dict[Rule, str] = {"farthest_point": "farthest", "greedy_dpp": "volume"}


def select(selector: RuleSelector, features: torch.Tensor) -> torch.Tensor:
    return selector.begin(GROUP, features, features.device).get().select(None).indices


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_its_method(rule: Rule) -> None:
    method = getattr(methods, rule)
    alone = [method(FEATURES[i : i + 1], 5).indices for i in range(3)]
    assert torch.equal(select(RuleSelector(rule), FEATURES), torch.cat(alone))


@pytest.mark.skipif(not interpreting(), reason="Triton doesn't interpret here")
@pytest.mark.parametrize("rule", RULES)
def test_kernels_take_all_segments_at_once(rule: Rule) -> None:
    pytest.importorskip("triton")
    selector = RuleSelector(rule, backend="triton")
    assert torch.equal(select(selector, FEATURES), select(RuleSelector(rule), FEATURES))
    with recording() as launches:
        select(selector, FEATURES)
    assert [one.grid for one in launches if one.kernel.fn.__name__ == RULES[rule]] == [(1, 3)]


def test_a_layer_that_nobody_computes_in_time_is_refused() -> None:
    model = llava()
    for layer in (-1, 5):
        with pytest.raises(ValueError, match=f"features must be between 0 and 4, .* got {layer}"):
            ocvtp.apply(model, "greedy_dpp", keep=4, features=layer)
    for wrong in ("late", True, 1.5):
        with pytest.raises(
            TypeError, match='features must be "early", "consumed", "auto" or an encoder layer'
        ):
            ocvtp.apply(model, "greedy_dpp", keep=4, features=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not for 'grid'"):
        ocvtp.apply(model, "grid", keep=4, features="early")
    layers = {features: ocvtp.apply(model, features=features, keep=4).read_layer for features in (0, "early")}
    assert layers == {0: 0, "early": 1}
    assert ocvtp.apply(model, keep=4).read_layer == 4


def test_what_tops_up_a_pruner() -> None:
    """Farthest points where it reads the consumed layer, unless somebody says otherwise."""
    family = families()[0]
    model = family.model()
    deepest = max(ocvtp.apply(model, "grid", keep=2).consumed_layers)
    cases = ((deepest, "auto", True), (deepest, "attention", False), (1, "auto", False))
    for layer, asked, farthest in cases:
        report = ocvtp.apply(model, family.pruner(layer=layer), keep=4, fill=asked)
        assert report.farthest is farthest
        assert ("topped up by farthest points" in str(report)) is farthest
    with pytest.raises(ValueError, match="fill is for pruners"):
        ocvtp.apply(model, "grid", keep=4, fill="attention")
    with pytest.raises(TypeError, match="'bogus'"):
        ocvtp.apply(model, "bogus", keep=4, features="early")  # type: ignore[arg-type]
