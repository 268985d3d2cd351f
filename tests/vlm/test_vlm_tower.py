"""The tower's loop: stopping early, and the deepest layer computed for kept rows only."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ocvtp.vlm.towers.clip import HeldLayer, TowerRun, root, run_tower
from tests.vlm.tiny_llava import LAYERS, TOKENS, llava, pixels

DEEPEST = LAYERS - 2
IMAGES = 3
#: Of a row, against the layer run whole: some float32 roundings of other sums. Stated in docs/tower.md.
ROUNDING = 8 * 2.0**-24


def make(tower: str = "clip", attention: str = "sdpa") -> Any:
    return llava(attention, tower=tower).model.vision_tower


def layer_of(tower: Any, index: int = DEEPEST) -> Any:
    return root(tower).encoder.layers[index]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest error of a row, relative to the row."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


def some(tower: Any, keep: int = 5, images: int = IMAGES, seed: int = 0) -> torch.Tensor:
    """Ascending tokens, other ones of each image."""
    tokens = root(tower).embeddings.num_positions
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(tokens, generator=generator)[:keep].sort().values for _ in range(images)]
    return torch.stack(rows)


def taken(outputs: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.stack([outputs[i, row] for i, row in enumerate(indices)])


def both(tower: Any, taps: set[int] | None = None, images: int = IMAGES) -> tuple[TowerRun, TowerRun]:
    """The tower run to the end of its deepest layer, and held."""
    taps = {2, DEEPEST} if taps is None else taps
    image = pixels(images).to(next(tower.parameters()).dtype)
    with torch.no_grad():
        return run_tower(tower, image, taps), run_tower(tower, image, taps, hold=True)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_kept_rows_are_those_of_the_layer(kind: str, attention: str) -> None:
    tower = make(kind, attention)
    exact, held = both(tower)
    whole = exact.outputs[DEEPEST]
    every = torch.arange(whole.shape[1]).expand(IMAGES, -1)
    assert error(held.finish(every), whole) <= ROUNDING
    for keep in (1, 5, TOKENS):
        indices = some(tower, keep)
        rows = held.finish(indices)
        assert error(rows, taken(whole, indices)) <= ROUNDING
        assert torch.equal(exact.finish(indices), taken(whole, indices))
    assert torch.equal(exact.outputs[2], held.outputs[2])
    assert set(held.outputs) == {2}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_rounding_is_no_worse_than_that_of_the_layer(kind: str) -> None:
    """Against the layer in float64: at most twice the error of the layer in float32."""
    tower = make(kind)
    layer = layer_of(tower)
    hidden = torch.randn(2, 65, layer.embed_dim)
    oracle = copy.deepcopy(layer).double()(hidden.double(), None)
    whole = layer(hidden, None)
    indices = some(tower, 9, 2)
    got = error(HeldLayer(layer, hidden).rows(indices), taken(oracle, indices))
    assert got <= 2 * error(taken(whole, indices), taken(oracle, indices))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype, attention: str) -> None:
    tower = make(attention=attention)
    hidden = torch.randn(2, 65, 64).to(dtype)
    layer = layer_of(tower).to(dtype)
    oracle = copy.deepcopy(layer).double()(hidden.double(), None)
    indices = some(tower, 9, 2)
    rows = HeldLayer(layer, hidden).rows(indices)
    assert rows.dtype == dtype
    whole = taken(layer(hidden, None), indices)
    assert error(rows, taken(oracle, indices)) <= 2 * error(whole, taken(oracle, indices))


@torch.no_grad()
def test_autocast() -> None:
    tower = make()
    hidden, layer = torch.randn(2, 65, 64), layer_of(tower)
    indices = some(tower, 9, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = taken(layer(hidden, None), indices)
        held = HeldLayer(layer, hidden)
        rows = held.rows(indices)
        scores = held.received_attention("auto")
    assert rows.dtype == whole.dtype
    assert scores.dtype == torch.float32
    oracle = taken(layer.double()(hidden.double(), None), indices)
    assert 1e-4 < error(rows, oracle) <= 2 * error(whole, oracle)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_scores_are_the_same_bits(kind: str) -> None:
    tower = make(kind)
    exact, held = (run_tower(tower, pixels(IMAGES), {DEEPEST}, hold=hold) for hold in (False, True))
    want, scores = exact.received_attention("torch"), held.received_attention("torch")
    assert torch.equal(want, scores)
    assert held.finish(some(tower)).requires_grad
    assert not want.requires_grad
    assert not scores.requires_grad


@pytest.mark.parametrize("images", [1, 5])
@torch.no_grad()
def test_images_of_a_batch_choose_for_themselves(images: int) -> None:
    tower = make()
    exact, held = both(tower, images=images)
    indices = some(tower, images=images)
    want = taken(exact.outputs[DEEPEST], indices)
    assert error(held.finish(indices, range(images)), want) <= ROUNDING
    for which in ([images - 1], [0], list(range(images))[::-1]):
        assert error(held.finish(indices[which], which), want[which]) <= ROUNDING
        assert torch.equal(exact.finish(indices[which], which), want[which])


@torch.no_grad()
def test_images_with_different_numbers_of_rows() -> None:
    exact, held = both(make())
    whole = exact.outputs[DEEPEST].flatten(0, 1)
    indices = torch.tensor([0, 3, 16, 17 + 5, 34 + 1, 34 + 2, 34 + 9])
    assert error(held.finish_flat(indices), whole[indices]) <= ROUNDING
    assert torch.equal(exact.finish_flat(indices), whole[indices])


def test_indices_that_do_not_fit() -> None:
    for run in both(make()):
        with pytest.raises(ValueError, match="indices"):
            run.finish(torch.zeros(IMAGES - 1, 4, dtype=torch.long))
        with pytest.raises(TypeError, match="int64"):
            run.finish(torch.zeros(IMAGES, 4))
        with pytest.raises(ValueError, match="indices"):
            run.finish_flat(torch.zeros(IMAGES, 4, dtype=torch.long))


def count_rows(layer: Any) -> dict[str, list[int]]:
    """Rows that each submodule of a layer is called with, as it is called."""
    seen: dict[str, list[int]] = {}
    for name, module in layer.named_modules():
        calls = seen.setdefault(name, [])

        def note(_: Any, args: Any, out: Any, calls: list[int] = calls) -> None:
            calls.append(_first(out).shape[1])

        module.register_forward_hook(note)
    return seen


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_every_part_is_computed_once_and_no_row_more_than_needed(kind: str) -> None:
    tower = make(kind)
    tokens = root(tower).embeddings.num_positions
    calls = count_rows(layer_of(tower))
    after = count_rows(layer_of(tower, DEEPEST + 1))
    run = run_tower(tower, pixels(2), {DEEPEST}, hold=True)
    assert not calls["self_attn.out_proj"]
    assert not calls["layer_norm2"]
    run.received_attention("auto")
    run.finish(some(tower, 5, 2))
    for name in ("layer_norm1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        assert calls[name] == [tokens]
    for name in ("self_attn.out_proj", "layer_norm2", "mlp", "mlp.fc1", "mlp.fc2"):
        assert calls[name] == [5]
    assert not any(after.values())
    run_tower(tower, pixels(2), {DEEPEST}).received_attention("auto")
    assert calls["self_attn.q_proj"] == [tokens] * 3  # held: 1; otherwise a second time, for the scores


@torch.no_grad()
def test_layers_that_return_their_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of older releases do."""
    tower = make()
    want, _ = both(tower)
    kind = type(layer_of(tower))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **kwargs: (_first(forward(*args, **kwargs)), None))
    got, held = both(tower)
    assert torch.equal(got.outputs[DEEPEST], want.outputs[DEEPEST])
    assert torch.equal(held.outputs[2], want.outputs[2])


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def test_of_several_consumed_layers_the_deepest_is_held() -> None:
    tower, told = make(), []
    exact, _ = both(tower, {1, 3, 4})
    run = run_tower(tower, pixels(IMAGES), {1, 3, 4}, lambda i, _: told.append(i), hold=True)
    assert told == [1, 3]
    assert torch.equal(run.outputs[1], exact.outputs[1])
    assert torch.equal(run.outputs[3], exact.outputs[3])
    indices = some(tower)
    assert error(run.finish(indices), taken(exact.outputs[4], indices)) <= ROUNDING


def gradients(tower: Any, hold: bool) -> dict[str, torch.Tensor]:
    indices = some(tower)
    tower.zero_grad()
    run = run_tower(tower, pixels(IMAGES), {2, DEEPEST}, hold=hold)
    run.received_attention("auto")
    weights = torch.randn(IMAGES, 5, 64, generator=torch.Generator().manual_seed(1))
    (run.finish(indices) * weights).sum().backward()
    return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_training_through_the_tower(kind: str) -> None:
    tower = make(kind)
    want, got = gradients(tower, hold=False), gradients(tower, hold=True)
    assert want.keys() == got.keys()
    assert any(name.endswith("embeddings.patch_embedding.weight") for name in got)
    for name, gradient in got.items():
        scale = want[name].abs().max()
        if name.endswith("k_proj.bias"):  # is zero but for rounding: it shifts all logits of a query alike
            scale = want[name.replace("bias", "weight")].abs().max()
        assert (gradient - want[name]).abs().max() <= 1e-5 * scale, name


def test_attention_dropout_is_that_of_the_layer() -> None:
    layer = layer_of(make())
    layer.self_attn.dropout = 0.5
    hidden, every = torch.randn(1, 17, 64), torch.arange(17)[None]
    quiet = HeldLayer(layer.eval(), hidden).rows(every)
    assert torch.equal(quiet, HeldLayer(layer, hidden).rows(every))
    layer.train()
    assert error(HeldLayer(layer, hidden).rows(every), quiet) > 1e-3


@torch.no_grad()
def test_compiled_without_a_break() -> None:
    tower = make()
    indices = some(tower)

    def held(image: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        run = run_tower(tower, image, {2, DEEPEST}, hold=True)
        return run.received_attention("torch"), run.finish(indices), run.finish_flat(indices.flatten())

    torch._dynamo.reset()
    compiled = torch.compile(held, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(pixels(IMAGES), indices), held(pixels(IMAGES), indices), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------- ecosystem


@pytest.mark.parametrize("target", ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"])
@torch.no_grad()
def test_lora_takes_effect(target: str) -> None:
    peft = pytest.importorskip("peft")
    plain = make()
    indices = some(plain)
    without = both(plain)[1].finish(indices)
    name = f"layers.{DEEPEST}.{'mlp' if target.startswith('fc') else 'self_attn'}.{target}"
    adapted = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=rf".*{name}")).eval()
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:  # zero at first, which would test nothing
            parameter.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    tower = adapted.get_base_model()
    exact, held = both(tower)
    rows = held.finish(indices)
    assert error(rows, taken(exact.outputs[DEEPEST], indices)) <= ROUNDING
    assert error(rows, without) > 1e-3
    assert torch.equal(exact.received_attention("auto"), held.received_attention("auto"))


@pytest.mark.parametrize("place", ["cpu", "disk"])
@torch.no_grad()
def test_offloaded_weights(place: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    tower = make()
    indices = some(tower)
    _, held = both(tower)
    want_scores, want = held.received_attention("auto"), held.finish(indices)
    if place == "cpu":
        accelerate.cpu_offload(tower, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(tower, str(tmp_path), execution_device=torch.device("cpu"))
    layer = layer_of(tower)
    run = run_tower(tower, pixels(IMAGES), {2, DEEPEST}, hold=True)
    assert torch.equal(run.received_attention("auto"), want_scores)
    assert torch.equal(run.finish(indices), want)
    assert layer.self_attn.q_proj.weight.is_meta
    assert layer.mlp.fc1.weight.is_meta


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_quantised_linears(bits: int) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    tower = make()
    plain = both(tower)[1].finish(some(tower))
    for module in list(tower.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                module.add_module(name, _quantised(bnb, child, bits))
    tower.to("cpu")
    exact, held = both(tower)
    rows = held.finish(some(tower))
    # 8-bit products round rows together with their neighbours' outliers, so a bound of its own.
    assert error(rows, taken(exact.outputs[DEEPEST], some(tower))) <= (ROUNDING if bits == 4 else 1e-2)
    assert error(rows, plain) > 1e-3


def _quantised(bnb: Any, linear: torch.nn.Linear, bits: int) -> torch.nn.Module:
    sizes = linear.in_features, linear.out_features
    if bits == 4:
        made = bnb.nn.Linear4bit(*sizes, quant_type="nf4", compute_dtype=torch.float32)
    else:
        made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made


def test_threads_do_not_meet() -> None:
    tower = make()
    images = [pixels(IMAGES, seed=i) for i in range(8)]

    def run(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            held = run_tower(tower, images[i], {2, DEEPEST}, hold=True)
            return held.received_attention("auto"), held.finish(some(tower, seed=i))

    alone = [run(i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(run, range(8)), alone, strict=True):
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
