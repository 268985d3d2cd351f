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
    make_pruner(
        ocvtp.PrunerConfig(in_dim=16, hidden_dim=8, slot_dim=8, ffn_dim=8, **config), seed
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_needs_no_pruner(rule: str) -> None:
    spec = Spec.from_dict({"keep": 3, "pruner": rule})
    assert spec.rule == rule
    assert spec.options().pruner == rule
    assert spec.options().weigh is False


def test_anything_else_names_a_pruner(tmp_path: Path) -> None:
    spec = Spec.from_dict({"pruner": saved(tmp_path)})
    assert spec.rule is None
    assert isinstance(spec.options().pruner, ocvtp.OCPruner)
    assert spec.load_pruner() is spec.load_pruner()


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


@pytest.mark.parametrize("given", [{"pruner": 3}, {"pruner": " "}, {"pruner": None}, {"refine": "2"}])
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
    def test_settings_differ(self, tmp_path: Path) -> None:
        own = saved(tmp_path)
        given: list[dict[str, Any]] = [
            {},
            {"keep": 63},
            {"keep": 0.5},
            {"pruner": "grid"},
            {"pruner": own},
            *({"pruner": own, **one} for one in ({"seed": 1}, {"refine": 1}, {"merge": "off"})),
            *({"pruner": own, **one} for one in ({"newlines": "all"}, {"backend": "torch"})),
            *({"pruner": own, **one} for one in ({"fill": "farthest_point"}, {"precision": "fp32"})),
            {"features": "early"},
        ]
        digests = [Spec.from_dict(one).digest() for one in given]
        assert len(set(digests)) == len(given)

    def test_weights_and_architecture_differ(self, tmp_path: Path) -> None:
        folders = [
            saved(tmp_path / "one"),
            saved(tmp_path / "weights", seed=1),
            saved(tmp_path / "layer", layer=3),
            saved(tmp_path / "eps", eps=1e-6),
        ]
        digests = [Spec.from_dict({"pruner": folder}).digest() for folder in folders]
        assert len(set(digests)) == len(folders)

    def test_one_number_differs(self, tmp_path: Path) -> None:
        one = saved(tmp_path / "one")
        pruner = ocvtp.OCPruner.from_pretrained(one)
        next(iter(pruner.parameters())).data.flatten()[-1] += 1e-6
        pruner.save_pretrained(tmp_path / "other")
        other = Spec.from_dict({"pruner": str(tmp_path / "other")})
        assert Spec.from_dict({"pruner": one}).digest() != other.digest()

    def test_a_copy_is_the_same(self, tmp_path: Path) -> None:
        one = saved(tmp_path / "one")
        copied = shutil.copytree(one, tmp_path / "copied")
        assert Spec.from_dict({"pruner": one}).digest() == Spec.from_dict({"pruner": str(copied)}).digest()


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
