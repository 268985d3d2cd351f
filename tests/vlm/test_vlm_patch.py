"""Installing, removing, replacing and refusing the patch."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

import ocvtp
from ocvtp.vlm.encode.selectors import Home, PrunerSelector
from ocvtp_kernels import BackendUnavailableError
from tests.vlm.skips import NATIVE_ROUTE, needs_original
from tests.vlm.tiny_llava import (
    GREEDY,
    KEEP,
    LAYERS,
    ONE,
    TOKENS,
    WIDTH,
    llava,
    mixed,
    pixels,
    prompt,
    pruner,
    text_config,
)

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.fixture
def one() -> dict[str, torch.Tensor]:
    return prompt(ONE, pixels(1))


def short(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Tokens the language model sees."""
    with torch.no_grad():
        return model(**inputs).logits.shape[1]


def pruned_length(keep: int) -> int:
    return len(ONE) - TOKENS + keep


@torch.no_grad()
def test_remove_restores_every_bit(model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]) -> None:
    before = dict(model.__dict__)
    want, ids = model(**one).logits, model.generate(**one, **GREEDY)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    model.generate(**one, **GREEDY)
    ocvtp.remove(model)
    assert model.__dict__.keys() == before.keys()
    assert torch.equal(model(**one).logits, want)
    assert torch.equal(model.generate(**one, **GREEDY), ids)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert "forward" not in LlavaForConditionalGeneration.__dict__.get("__slots__", ())
    ocvtp.remove(model)  # twice is harmless


def test_only_this_instance_is_patched(model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]) -> None:
    methods = LlavaForConditionalGeneration.forward, LlavaForConditionalGeneration.generate
    other = llava()
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    assert (LlavaForConditionalGeneration.forward, LlavaForConditionalGeneration.generate) == methods
    assert short(other, one) == len(ONE)


def test_report(model: Any, oc_pruner: Any) -> None:
    report = ocvtp.apply(model, oc_pruner, keep=KEEP)
    assert report.family == "llava"
    assert report.tower == "clip_vision_model"
    assert (report.read_layer, report.consumed_layers, report.num_layers) == (2, (LAYERS - 2,), LAYERS)
    assert (report.attention, report.backend) == ("sdpa", "torch")
    assert (report.tokens_before, report.tokens_after) == (TOKENS, KEEP)
    assert (report.positions, report.route) == ("compact", NATIVE_ROUTE)
    text = str(report)
    for part in ("16 -> 5", "31.2%", "layer 2", "layer 4", "sdpa", "compact", NATIVE_ROUTE):
        assert part in text


def test_applying_again_replaces_the_settings(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]
) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    forward = model.__dict__["forward"]
    ocvtp.apply(model, oc_pruner, keep=7)
    assert model.__dict__["forward"] is forward
    assert short(model, one) == pruned_length(7)
    with pytest.raises(ValueError, match="keep"):
        ocvtp.apply(model, oc_pruner, keep=TOKENS + 1)
    assert short(model, one) == pruned_length(7)  # a refused apply changes nothing
    ocvtp.remove(model)
    assert short(model, one) == len(ONE)


def test_seed_and_pruner_matter(model: Any, oc_pruner: Any) -> None:
    images = pixels(6)

    def chosen(**options: Any) -> list[list[int]]:
        ocvtp.apply(model, options.pop("pruner", oc_pruner), keep=KEEP, **options)
        return ocvtp.vlm.select(model, images).indices.tolist()

    assert chosen(seed=0) == chosen(seed=0)
    assert chosen(seed=0) != chosen(seed=1)
    assert chosen() != chosen(pruner=pruner(seed=11))


def test_pruned_restores_what_was_there(model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]) -> None:
    with ocvtp.pruned(model, oc_pruner, keep=KEEP) as report:
        assert report.tokens_after == KEEP
        assert short(model, one) == pruned_length(KEEP)
        with ocvtp.pruned(model, oc_pruner, keep=9):
            assert short(model, one) == pruned_length(9)
        assert short(model, one) == pruned_length(KEEP)
    assert short(model, one) == len(ONE)
    assert "forward" not in model.__dict__

    ocvtp.apply(model, oc_pruner, keep=3)

    class Fault(Exception):
        pass

    with pytest.raises(Fault), ocvtp.pruned(model, oc_pruner, keep=9):
        raise Fault
    assert short(model, one) == pruned_length(3)
    with ocvtp.pruned(model, oc_pruner, keep=9):
        ocvtp.remove(model)
    assert short(model, one) == pruned_length(3)
    with pytest.raises(ValueError, match="keep"), ocvtp.pruned(model, oc_pruner, keep=0):
        raise AssertionError("never entered")
    assert short(model, one) == pruned_length(3)


def test_refinement_reaches_the_tokens(model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]) -> None:
    from ocvtp_kernels.coverage import refine

    report = ocvtp.apply(model, oc_pruner, keep=KEEP, refine=2)
    assert "2 rounds of refinement" in str(report)
    refined = ocvtp.vlm.select(model, one["pixel_values"]).indices
    with ocvtp.pruned(model, oc_pruner, keep=KEEP) as plain:
        assert "refinement" not in str(plain)
        published = ocvtp.vlm.select(model, one["pixel_values"]).indices
    tower = model.model.vision_tower
    hidden = tower(one["pixel_values"], output_hidden_states=True).hidden_states
    features = hidden[oc_pruner.config.layer + 1][:, 1:]
    assert torch.equal(refined, refine(features, published, 2))
    assert not torch.equal(refined, published)
    assert short(model, one) == pruned_length(KEEP)
    with pytest.raises(ValueError, match="between 0 and 100"):
        ocvtp.apply(model, oc_pruner, keep=KEEP, refine=-1)
    with pytest.raises(ValueError, match="needs max_error="):
        ocvtp.apply(model, oc_pruner, keep="auto")


@pytest.mark.parametrize("keep", [0, -1, TOKENS + 1])
def test_budgets_out_of_range(model: Any, oc_pruner: Any, keep: int) -> None:
    with pytest.raises(ValueError, match="between 1 and"):
        ocvtp.apply(model, oc_pruner, keep=keep)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("keep", [True, None, [5]])
def test_budgets_that_are_no_int(model: Any, oc_pruner: Any, keep: Any) -> None:
    with pytest.raises(TypeError, match="keep must be an int"):
        ocvtp.apply(model, oc_pruner, keep=keep)


@pytest.mark.parametrize("keep", [0.0, 1.5, -0.1, float("nan"), "5"])
def test_shares_and_words_that_mean_nothing(model: Any, oc_pruner: Any, keep: Any) -> None:
    with pytest.raises(ValueError, match="keep"):
        ocvtp.apply(model, oc_pruner, keep=keep)
    assert "forward" not in model.__dict__


def test_pruners_that_do_not_fit(model: Any) -> None:
    with pytest.raises(
        ValueError,
        match=f"width 48, .* {WIDTH} wide; use one trained for .*--layer 3 .*ocvtp train",
    ):
        ocvtp.apply(model, pruner(in_dim=48), keep=KEEP)
    for layer in (LAYERS - 1, 40):
        with pytest.raises(ValueError, match=f"reads encoder layer {layer}, which must not be beyond .*4"):
            ocvtp.apply(model, pruner(layer=layer), keep=KEEP)
    with pytest.raises(TypeError, match="OCPruner; got Linear"):
        ocvtp.apply(model, torch.nn.Linear(2, 2), keep=KEEP)


def test_unknown_settings(model: Any, oc_pruner: Any) -> None:
    with pytest.raises(ValueError, match='positions must be "compact"'):
        ocvtp.apply(model, oc_pruner, keep=KEEP, positions="gapped")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend must be"):
        ocvtp.apply(model, oc_pruner, keep=KEEP, backend="cuda")
    with pytest.raises(ValueError, match="precision must be"):
        ocvtp.apply(model, oc_pruner, keep=KEEP, precision="int8")
    with pytest.raises(ValueError, match="seed must be"):
        ocvtp.apply(model, oc_pruner, keep=KEEP, seed=-1)
    assert "forward" not in model.__dict__


def test_triton_kernels_run_or_apply_refuses(
    model: Any, oc_pruner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU or in the interpreter the kernels pick the same tokens; elsewhere nothing is patched."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, batch = model.to(device), {name: value.to(device) for name, value in mixed()[0].items()}
    ocvtp.apply(model, oc_pruner, keep=KEEP, backend="torch")
    want = ocvtp.vlm.select(model, batch["pixel_values"]).indices
    ids = model.generate(**batch, **GREEDY)
    report = ocvtp.apply(model, oc_pruner, keep=KEEP, backend="triton")
    assert report.backend == "triton"
    assert torch.equal(ocvtp.vlm.select(model, batch["pixel_values"]).indices, want)
    assert torch.equal(model.generate(**batch, **GREEDY), ids)
    ocvtp.remove(model)
    monkeypatch.setattr("ocvtp_kernels._arch.has_triton", lambda: False)
    with pytest.raises(BackendUnavailableError, match="triton is not installed"):
        ocvtp.apply(model, oc_pruner, keep=KEEP, backend="triton")
    assert "forward" not in model.__dict__


def test_apply_refuses_kernels_for_a_model_in_float64(oc_pruner: Any) -> None:
    """The kernels of a rule and of merging take up to 32 bits: said before the first call, not in it."""
    model = llava().double().to("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(BackendUnavailableError, match="up to 32 bits, and the model is float64"):
        ocvtp.apply(model, "greedy_dpp", keep=KEEP, backend="triton")
    assert "forward" not in model.__dict__
    assert ocvtp.apply(model, "greedy_dpp", keep=KEEP).backend == "torch"


def test_unsupported_models(oc_pruner: Any) -> None:
    with pytest.raises(ocvtp.UnsupportedModelError, match=r"model_type 'llama'\); supported: .*llava"):
        ocvtp.apply(LlamaForCausalLM(text_config()), oc_pruner)
    with pytest.raises(ocvtp.UnsupportedModelError, match="Linear"):
        ocvtp.apply(torch.nn.Linear(2, 2), oc_pruner)
    with pytest.raises(ocvtp.UnsupportedModelError, match="not a torch"):
        ocvtp.apply("llava-hf/llava-1.5-7b-hf", oc_pruner)
    with pytest.raises(ocvtp.UnsupportedModelError, match="ForConditionalGeneration itself"):
        ocvtp.apply(llava().model, oc_pruner)
    vision = PixtralVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=text_config(), vision_feature_layer=-1)
    with pytest.raises(ocvtp.UnsupportedModelError, match=r"'pixtral' vision tower; supported: clip_vision"):
        ocvtp.apply(LlavaForConditionalGeneration(config), oc_pruner)


def test_original_positions_need_a_recent_transformers(
    model: Any, oc_pruner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.__version__", "5.9.1")
    with pytest.raises(ValueError, match=r"transformers >= 5\.10"):
        ocvtp.apply(model, oc_pruner, keep=KEEP, positions="original")
    assert ocvtp.apply(model, oc_pruner, keep=KEEP).positions == "compact"


@pytest.mark.parametrize(
    "place",
    ["forward", "generate", "get_image_features", "model.get_image_features", "model.vision_tower.forward"],
)
def test_foreign_patches_are_refused(model: Any, oc_pruner: Any, place: str) -> None:
    path, _, name = place.rpartition(".")
    module = model.get_submodule(path)
    original = getattr(module, name)

    @functools.wraps(original)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    module.__dict__[name] = theirs
    with pytest.raises(ocvtp.PatchError, match=f"{place} of this LlavaForConditionalGeneration was replaced"):
        ocvtp.apply(model, oc_pruner, keep=KEEP)
    assert module.__dict__[name] is theirs
    assert "_ocvtp" not in model.__dict__
    del module.__dict__[name]
    ocvtp.apply(model, oc_pruner, keep=KEEP)


def test_a_patch_on_top_of_ours_is_refused_next_time(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]
) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    ours = model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: ours(*args, **kwargs), model)
    with pytest.raises(ocvtp.PatchError, match="forward of this"):
        ocvtp.apply(model, oc_pruner, keep=7)
    assert short(model, one) == pruned_length(KEEP)
    theirs = model.__dict__["forward"]
    ocvtp.remove(model)
    assert model.__dict__["forward"] is theirs  # not ours to take away
    assert short(model, one) == len(ONE)


def test_deepcopy_is_a_model_of_its_own(model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    want = model.generate(**one, **GREEDY)
    twin = copy.deepcopy(model)
    assert twin.forward.__self__ is twin
    assert torch.equal(twin.generate(**one, **GREEDY), want)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    assert not torch.equal(twin.generate(**one, **GREEDY), want)
    assert torch.equal(model.generate(**one, **GREEDY), want)
    ocvtp.remove(twin)
    assert short(twin, one) == len(ONE)
    assert short(model, one) == pruned_length(KEEP)
    ocvtp.apply(twin, oc_pruner, keep=7)
    assert short(model, one) == pruned_length(KEEP)


def test_nothing_of_ours_is_saved(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    keys, parameters = list(model.state_dict()), len(list(model.parameters()))
    config = model.config.to_dict()
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    model.generate(**one, **GREEDY)
    assert list(model.state_dict()) == keys
    assert len(list(model.parameters())) == parameters
    assert model.config.to_dict() == config
    model.save_pretrained(tmp_path)
    assert not any("ocvtp" in path.read_text(errors="ignore") for path in tmp_path.glob("*.json"))
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert short(loaded, one) == len(ONE)
    ocvtp.apply(loaded, oc_pruner, keep=KEEP)
    assert torch.equal(loaded.generate(**one, **GREEDY), model.generate(**one, **GREEDY))


def test_model_dtype_does_not_reach_the_pruner(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]
) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    model.bfloat16()
    out = model.generate(**one, **GREEDY)
    assert out.shape[1] == len(ONE) + GREEDY["max_new_tokens"]
    assert all(p.dtype == torch.float32 for p in oc_pruner.parameters())


def test_the_pruner_follows_the_features() -> None:
    module, home = torch.nn.Linear(2, 2), Home()
    home.move(module, CPU)
    weight = module.weight
    home.move(module, META)
    assert module.weight.device.type == "meta"
    home.move(torch.nn.Identity(), META)  # nothing to move
    assert weight.device.type == "cpu"


class Movable(torch.nn.Linear):
    """Comes back from ``meta`` too."""

    def to(self, device: Any) -> Any:
        return self.to_empty(device=device)


def test_one_pruner_does_not_serve_two_devices() -> None:
    """It would go to and fro."""
    module, first, second = Movable(2, 2), Home(), Home()
    first.move(module, CPU)
    second.move(module, CPU)
    first.move(module, META)
    second.move(module, META)  # two models that moved, one after the other
    stays, goes = Home(), Home()
    stays.move(module, META)
    goes.move(module, CPU)  # perhaps all are on their way
    with pytest.raises(ValueError, match=r"can't serve models on meta and cpu.*deepcopy"):
        stays.move(module, META)
    goes.move(module, CPU)
    goes.leave(module)
    stays.move(module, META)
    module.to(CPU)  # by hand
    stays.move(module, META)
    assert module.weight.is_meta
    other = copy.deepcopy(stays)
    other.move(copy.deepcopy(module), CPU)
    stays.move(module, META)


def test_a_removed_model_gives_its_pruner_free() -> None:
    module = Movable(2, 2)
    stays, goes = (PrunerSelector(module, {}) for _ in range(2))
    stays.home.move(module, META)
    goes.home.move(module, CPU)
    with pytest.raises(ValueError, match="serve"):
        stays.home.move(module, META)
    goes.close()
    stays.home.move(module, META)


def test_stage_times(model: Any, oc_pruner: Any, one: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ocvtp.PatchError, match="not patched"), ocvtp.vlm.stage_times(model):
        raise AssertionError("never entered")
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    with ocvtp.vlm.stage_times(model) as times:
        assert times == {"vision tower": 0.0, "pruner": 0.0, "projector": 0.0}
        model.generate(**one, **GREEDY)
        once = dict(times)
        assert all(value > 0 for value in once.values())
        with ocvtp.vlm.stage_times(model) as inner:
            model.generate(**one, **GREEDY)
        assert times == once  # the inner one had the watch
        assert all(value > 0 for value in inner.values())
        model.generate(**one, **GREEDY)
    assert all(times[name] > once[name] for name in once)
    after = dict(times)
    model.generate(**one, **GREEDY)
    assert times == after


def test_no_synchronisation_unless_timing(
    model: Any, oc_pruner: Any, one: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.device] = []
    monkeypatch.setattr("ocvtp.vlm.encode.timing.synchronize", calls.append)
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    model.generate(**one, **GREEDY)
    assert not calls
    with ocvtp.vlm.stage_times(model):
        model.generate(**one, **GREEDY)
    assert len(calls) == 2 * 3 + 2  # before and after each of three stages, the pruner in two parts


def test_select_needs_a_patched_model(model: Any, oc_pruner: Any) -> None:
    with pytest.raises(ocvtp.PatchError, match="not patched"):
        ocvtp.vlm.select(model, pixels(1))
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    selection = ocvtp.vlm.select(model, pixels(2))
    assert selection.slot_attention is None
    assert selection.indices.shape == (2, KEEP)
    assert bool((selection.indices.diff(dim=1) > 0).all())


def test_importing_does_not_import_transformers() -> None:
    code = "import sys, ocvtp, ocvtp.vlm; ocvtp.apply; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_original_is_reported() -> None:
    needs_original()
    report = ocvtp.apply(llava(), pruner(), keep=KEEP, positions="original")
    assert report.positions == "original"
