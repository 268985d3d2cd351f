"""Settings of a server, told right from wrong without vLLM."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ocvtp
from ocvtp.serving.vllm.plan import plan_for
from ocvtp.serving.vllm.spec import KEY, Spec, spec_of
from tests.conftest import make_pruner

RULES = ("attention", "random", "grid", "farthest_point", "greedy_dpp")


def saved(folder: Path, seed: int = 0, **config: Any) -> str:
    sizes: dict[str, Any] = {"in_dim": 16, "hidden_dim": 8, "slot_dim": 8, "ffn_dim": 8}
    make_pruner(ocvtp.PrunerConfig(**{**sizes, **config}), seed).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_needs_no_pruner(rule: str) -> None:
    spec = Spec.from_dict({"keep": 3, "pruner": rule})
    assert spec.rule == rule
    assert spec.options(None).pruner == rule
    assert spec.options(None).weigh is False


def test_anything_else_names_a_pruner(tmp_path: Path) -> None:
    spec = Spec.from_dict({"pruner": saved(tmp_path)})
    assert spec.rule is None
    pruner = spec.load_pruner()
    assert isinstance(pruner, ocvtp.OCPruner)
    assert spec.options(pruner).pruner is pruner


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "needs settings"),
        ([("keep", 3)], "needs settings"),
        ({"keep": 3, "kep": 4, "prune": 1}, "unknown ocvtp setting.s. kep, prune; there are keep, pruner"),
        ({"keep": "auto"}, "counts tokens before it has seen the image"),
        ({"weigh": True}, "weigh can't be set when vLLM serves: proportional attention adds numbers"),
        ({"tower": "kept_rows"}, "tower can't be set when vLLM serves: vLLM runs its own vision tower"),
        ({"layout": "official"}, "layout can't be set"),
        ({"frames": "all"}, "videos are refused"),
        ({"positions": "original"}, "numbers the tokens of a prompt itself"),
        ({"budgets": [3, 4]}, 'belong to keep="auto"'),
        ({"merge": "features"}, "the projector too"),
        ({"merge": "mean"}, "merge must be one of"),
        ({"newlines": "rows"}, "depends on what is chosen"),
        ({"layer": 3}, "layer is for official weights"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, torch"),
        ({"precision": "fp8"}, "precision"),
        ({"seed": -1}, "seed"),
        ({"refine": -1}, "refine"),
    ],
)
def test_what_makes_no_sense(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Spec.from_dict(given)


@pytest.mark.parametrize(
    "given", [{"pruner": 3}, {"pruner": ""}, {"refine": "2"}, {"pruner": "x", "layer": [8]}]
)
def test_wrong_types(given: Any) -> None:
    with pytest.raises(TypeError):
        Spec.from_dict(given)


def test_options_that_say_what_is_done_anyway_are_fine() -> None:
    assert Spec.from_dict({"keep": 3, "weigh": False, "tower": "exact", "positions": "auto"}) == Spec(keep=3)


def test_every_option_of_apply_is_a_setting_or_says_why_not() -> None:
    """A new one must not be forgotten: as an unknown setting it would say nothing."""
    from ocvtp.serving.vllm.spec import _NOT_HERE
    from ocvtp.vlm.options import Options

    options = {field.name for field in dataclasses.fields(Options)}
    settings = {field.name for field in dataclasses.fields(Spec)}
    assert options == (settings - {"layer"}) | set(_NOT_HERE)


class TestDigest:
    """Of engines that would keep other tokens."""

    @pytest.fixture
    def config(self) -> Any:
        from tests.vlm.tiny_llava import llava

        return llava().config

    @pytest.fixture
    def fitting(self, config: Any) -> dict[str, Any]:
        return {"in_dim": config.vision_config.hidden_size, "layer": 1}

    def digest(self, config: Any, given: dict[str, Any]) -> str:
        return plan_for(config, Spec.from_dict({"keep": 3, **given})).digest

    def test_settings_differ(self, tmp_path: Path, config: Any, fitting: dict[str, Any]) -> None:
        own = saved(tmp_path, **fitting)
        given: list[dict[str, Any]] = [
            {},
            {"keep": 2},
            {"keep": 1},
            {"keep": 1.0},  # all of them, though Python calls it equal to the one before
            {"keep": 0.5},
            {"pruner": "grid"},
            {"pruner": own},
            *({"pruner": own, **one} for one in ({"seed": 1}, {"refine": 1}, {"merge": "off"})),
            *({"pruner": own, **one} for one in ({"fill": "farthest_point"}, {"precision": "fp32"})),
            {"pruner": own, "backend": "torch"},
            {"features": "early"},
        ]
        assert len({self.digest(config, one) for one in given}) == len(given)

    def test_weights_and_architecture_differ(
        self, tmp_path: Path, config: Any, fitting: dict[str, Any]
    ) -> None:
        folders = [
            saved(tmp_path / "one", **fitting),
            saved(tmp_path / "weights", seed=1, **fitting),
            saved(tmp_path / "layer", **{**fitting, "layer": 0}),
            saved(tmp_path / "eps", eps=1e-6, **fitting),
        ]
        assert len({self.digest(config, {"pruner": folder}) for folder in folders}) == len(folders)

    def test_one_number_differs(self, tmp_path: Path, config: Any, fitting: dict[str, Any]) -> None:
        """Saved over the old pruner: a process that has served that one takes this one up."""
        one = saved(tmp_path / "one", **fitting)
        before = self.digest(config, {"pruner": one})
        pruner = ocvtp.OCPruner.from_pretrained(one)
        next(iter(pruner.parameters())).data.flatten()[-1] += 1e-6
        pruner.save_pretrained(one)
        assert self.digest(config, {"pruner": one}) != before

    def test_a_copy_is_the_same(self, tmp_path: Path, config: Any, fitting: dict[str, Any]) -> None:
        one = saved(tmp_path / "one", **fitting)
        copied = shutil.copytree(one, tmp_path / "copied")
        assert self.digest(config, {"pruner": one}) == self.digest(config, {"pruner": str(copied)})

    def test_another_layer_of_the_tower(self, config: Any) -> None:
        """The model's own configuration may be overridden too."""
        before = self.digest(config, {"pruner": "grid"})
        config.vision_feature_layer = -1
        assert self.digest(config, {"pruner": "grid"}) != before


def test_settings_are_found_in_a_configuration() -> None:
    assert spec_of(SimpleNamespace(**{KEY: {"keep": 7}})) == Spec(keep=7)
    with pytest.raises(ValueError, match="needs settings"):
        spec_of(SimpleNamespace())


def test_a_pruner_must_fit_the_model(tmp_path: Path) -> None:
    from tests.vlm.tiny_llava import llava

    config = llava().config
    spec = Spec.from_dict({"keep": 3, "pruner": saved(tmp_path)})
    with pytest.raises(ValueError, match=r"features of width 16.*ocvtp features IMAGES --encoder MODEL"):
        plan_for(config, spec)
    with pytest.raises(ValueError, match="keep must be between 1 and"):
        plan_for(config, Spec.from_dict({"keep": 5000}))
    with pytest.raises(ValueError, match="newlines='all' is not available for llava"):
        plan_for(config, Spec.from_dict({"keep": 3, "newlines": "all"}))
    plan = plan_for(config, Spec.from_dict({"keep": 3}))
    assert (plan.settings.merge, plan.settings.weigh, plan.keep(9)) == ("projected", False, 3)
