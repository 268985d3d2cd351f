"""What the patched model computes, against the unpatched one and against hand-built prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.vlm.towers.clip import root, run_tower
from tests.vlm.tiny_llava import (
    GREEDY,
    IMAGE,
    KEEP,
    LAYERS,
    NONE,
    ONE,
    PLAIN,
    TOKENS,
    TWO,
    llava,
    mixed,
    pad,
    pixels,
    prompt,
    pruner,
)


def hidden_states(model: Any, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model.model.vision_tower(images, output_hidden_states=True).hidden_states


def eager_scores(model: Any, images: torch.Tensor, layer: int) -> torch.Tensor:
    """Received attention from transformers' own attention maps, in an eager copy of the tower."""
    eager = llava("eager", tower=model.config.vision_config.model_type.split("_")[0])
    tower = eager.model.vision_tower
    tower.load_state_dict(model.model.vision_tower.state_dict())
    with torch.no_grad():
        return tower(images, output_attentions=True).attentions[layer].mean((1, 2))


def by_hand(model: Any, made: Any, row: list[int], images: torch.Tensor, positions: str) -> torch.Tensor:
    """Logits of the pruned prompt, built from transformers' outputs alone."""
    states = hidden_states(model, images)
    scores = eager_scores(model, images, LAYERS - 2)[:, 1:]
    kept = made(states[made.config.layer + 1][:, 1:], keep=KEEP, fill_scores=scores).indices
    embed = model.get_input_embeddings()
    pieces, numbers, column, image = [], [], 0, 0
    while column < len(row):
        if row[column] == IMAGE:
            rows = states[-2][image, 1:][kept[image]]
            pieces.append(model.model.multi_modal_projector(rows))
            numbers += (column + kept[image]).tolist()
            column, image = column + TOKENS, image + 1
        else:
            pieces.append(embed(torch.tensor([row[column]])))
            numbers.append(column)
            column += 1
    embeds = torch.cat(pieces)[None]
    ids = torch.tensor([numbers]) if positions == "original" else torch.arange(embeds.shape[1])[None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    return model(inputs_embeds=embeds, position_ids=ids, attention_mask=mask).logits


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_all_changes_no_bit(attention: str, positions: str, route: str, oc_pruner: Any) -> None:
    model = llava(attention)
    batch, rows = mixed()
    with torch.no_grad():
        want = model(**batch).logits, model(**rows[1]).logits
    want_ids = model.generate(**batch, **GREEDY)
    ocvtp.apply(model, oc_pruner, keep=TOKENS, positions=positions)
    runs = []
    layer = model.model.vision_tower
    layer.register_forward_hook(lambda *_: runs.append("whole tower"))
    with torch.no_grad():
        got = model(**batch).logits, model(**rows[1]).logits
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert torch.equal(model.generate(**batch, **GREEDY), want_ids)
    assert not runs  # our loop ran, not the original


@pytest.mark.parametrize("row", [ONE, TWO])
@torch.no_grad()
def test_pruned_logits_are_those_of_the_hand_built_prompt(
    row: list[int], positions: str, route: str, model: Any, oc_pruner: Any
) -> None:
    images = pixels(row.count(IMAGE) // TOKENS)
    want = by_hand(model, oc_pruner, row, images, positions)
    unpruned = model(**prompt(row, images)).logits
    ocvtp.apply(model, oc_pruner, keep=KEEP, positions=positions, **PLAIN)
    got = model(**prompt(row, images)).logits
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got[:, -1], unpruned[:, -1], atol=1e-2)


def test_left_padded_batch_equals_its_rows(positions: str, route: str, model: Any, oc_pruner: Any) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP, positions=positions)
    batch, rows = mixed()
    width = batch["input_ids"].shape[1]
    out = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(out.sequences[:, :width], batch["input_ids"])
    assert (
        out.past_key_values.get_seq_length() == len(TWO) - 2 * (TOKENS - KEEP) + GREEDY["max_new_tokens"] - 1
    )
    for i, row in enumerate(rows):
        alone = model.generate(**row, **GREEDY, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(alone.sequences[0, row["input_ids"].shape[1] :], out.sequences[i, width:])
        for step_alone, step in zip(alone.logits, out.logits, strict=True):
            torch.testing.assert_close(step_alone[0], step[i], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_left_padded_forward_equals_its_rows(positions: str, route: str, model: Any, oc_pruner: Any) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP, positions=positions)
    batch, rows = mixed()
    logits = model(**batch).logits
    for i, row in enumerate(rows):
        alone = model(**row).logits[0]
        torch.testing.assert_close(logits[i, -alone.shape[0] :], alone, atol=1e-4, rtol=1e-4)


def test_rows_that_lose_equally_need_no_padding(model: Any, oc_pruner: Any) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    images = pixels(2)
    both = model(input_ids=torch.tensor([ONE, ONE]), pixel_values=images).logits
    assert both.shape[1] == len(ONE) - TOKENS + KEEP
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], model(**prompt(ONE, images[i : i + 1])).logits)


@pytest.mark.parametrize("layer", [-1, -2, -3, 4, [-2], [-3, -1], [3, -2]])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_taps_are_the_hidden_states(tower: str, layer: Any, oc_pruner: Any) -> None:
    model = llava(tower=tower, layer=layer, strategy="full")
    images = pixels(2)
    states = hidden_states(model, images)
    facts = ocvtp.vlm.patch.adapter_for(model).facts({})
    run = run_tower(model.model.vision_tower, images, {2, *facts.consumed_layers})
    assert torch.equal(run.outputs[2], states[3])
    wanted = [layer] if isinstance(layer, int) else layer
    for consumed, index in zip(facts.consumed_layers, wanted, strict=True):
        assert torch.equal(run.outputs[consumed], states[index])
    deepest = max(facts.consumed_layers)
    want = eager_scores(model, images, deepest)
    # The eager tower rounds differently from the sdpa one below this layer already.
    torch.testing.assert_close(run.received_attention("auto"), want, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("layer", "ran"), [(-1, 6), (-2, 5), ([-3, 2], 4)])
def test_no_layer_after_the_consumed_one_runs(layer: Any, ran: int) -> None:
    model = llava(layer=layer)
    ocvtp.apply(model, pruner(layer=1), keep=KEEP)
    calls: list[int] = []
    for i, encoder_layer in enumerate(root(model.model.vision_tower).encoder.layers):
        encoder_layer.register_forward_hook(lambda *_, i=i: calls.append(i))
    model.generate(**prompt(ONE, pixels(1)), **GREEDY)
    assert calls == list(range(ran))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, [2, -2]])
@torch.no_grad()
def test_every_layout_against_transformers(
    tower: str, strategy: str, layer: Any, route: str, oc_pruner: Any
) -> None:
    model = llava(tower=tower, strategy=strategy, layer=layer)
    images = pixels(2)
    features = torch.stack(list(model.get_image_features(images, return_dict=True).pooler_output))
    total = features.shape[1]
    assert total == TOKENS + {("clip", "full"): 1, ("siglip", "default"): -1}.get((tower, strategy), 0)
    row = [1, 5, *[IMAGE] * total, 7, *[IMAGE] * total, 8]
    want_all = model(**prompt(row, images)).logits
    class_rows = int((tower, strategy) == ("clip", "full"))
    ocvtp.apply(model, oc_pruner, keep=total - class_rows, **PLAIN)
    assert torch.equal(model(**prompt(row, images)).logits, want_all)

    report = ocvtp.apply(model, oc_pruner, keep=KEEP, **PLAIN)
    assert (report.tokens_before, report.tokens_after) == (total, KEEP + class_rows)
    indices = ocvtp.vlm.select(model, images).indices
    got = model(**prompt(row, images)).logits
    ocvtp.remove(model)
    pieces = [model.get_input_embeddings()(torch.tensor([1, 5]))]
    for i, after in enumerate((7, 8)):
        first = features[i, :class_rows]
        pieces += [first, features[i, class_rows:][indices[i]]]
        pieces.append(model.get_input_embeddings()(torch.tensor([after])))
    want = model(inputs_embeds=torch.cat(pieces)[None]).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_per_call_overrides(model: Any, oc_pruner: Any) -> None:
    images = pixels(1)
    row = [1, 5, *[IMAGE] * (TOKENS + 1), 7]
    options = {"vision_feature_layer": -3, "vision_feature_select_strategy": "full"}
    want = model(**prompt(row, images), **options).logits
    ocvtp.apply(model, oc_pruner, keep=TOKENS)
    assert torch.equal(model(**prompt(row, images), **options).logits, want)
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    assert model(**prompt(row, images), **options).logits.shape[1] == 3 + KEEP + 1
    generated = model.generate(**prompt(row, images), **options, **GREEDY)
    assert generated.shape[1] == len(row) + GREEDY["max_new_tokens"]
    with pytest.raises(ValueError, match="beyond the deepest layer"):
        model(**prompt(ONE, images), vision_feature_layer=2)
    with pytest.raises(ValueError, match="select_strategy"):
        model(**prompt(ONE, images), vision_feature_select_strategy="cls")
    with pytest.raises(ValueError, match="6 layers"):
        model(**prompt(ONE, images), vision_feature_layer=9)


def test_text_only_calls_are_untouched(model: Any, oc_pruner: Any) -> None:
    with torch.no_grad():
        want = model(**prompt(NONE)).logits
    batch = pad([NONE, NONE[:3]])
    want_ids = model.generate(**batch, **GREEDY)
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    with torch.no_grad():
        assert torch.equal(model(**prompt(NONE)).logits, want)
    assert torch.equal(model.generate(**batch, **GREEDY), want_ids)


def test_batched_images_choose_like_single_ones(model: Any, oc_pruner: Any) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    images = pixels(4)
    together = ocvtp.vlm.select(model, images, return_attention=True)
    assert together.slot_attention is not None
    assert together.slot_attention.shape == (4, KEEP, TOKENS)
    assert len({tuple(row) for row in together.indices.tolist()}) > 1  # the images differ
    for i in range(4):
        assert torch.equal(ocvtp.vlm.select(model, images[i : i + 1]).indices[0], together.indices[i])


def test_fill_scores_are_eager_attention_to_the_last_digits() -> None:
    model, images = llava("eager"), pixels(3)
    want = eager_scores(model, images, LAYERS - 2)
    run = run_tower(model.model.vision_tower, images, {LAYERS - 2})
    torch.testing.assert_close(run.received_attention("auto"), want, atol=1e-7, rtol=1e-6)


def test_autocast_does_not_reach_scores_and_pruner(model: Any, oc_pruner: Any) -> None:
    seen = []

    class Spy(torch.nn.Module):
        config = oc_pruner.config

        def forward(self, features: torch.Tensor, fill_scores: torch.Tensor, **kwargs: Any) -> Any:
            selection = oc_pruner(features, fill_scores=fill_scores, **kwargs)
            seen.append((features, fill_scores, selection.indices))
            return selection

    ocvtp.apply(model, Spy(), keep=KEEP)
    images = pixels(2)
    tower = model.model.vision_tower
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.generate(input_ids=torch.tensor([ONE, ONE]), pixel_values=images, **GREEDY)
        with torch.no_grad():
            before = run_tower(tower, images, {LAYERS - 3}).outputs[LAYERS - 3]
            layer = root(tower).encoder.layers[LAYERS - 2]
            x = layer.layer_norm1(before)
            query, key = layer.self_attn.q_proj(x), layer.self_attn.k_proj(x)
    features, scores, indices = seen[0]
    assert query.dtype == torch.bfloat16  # autocast is on in the tower, as it is without the patch
    query, key = (t.float().unflatten(-1, (4, -1)).transpose(1, 2) for t in (query, key))
    want = (query @ key.transpose(-1, -2) * layer.self_attn.scale).softmax(-1).mean((1, 2))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, want[:, 1:], atol=1e-6, rtol=1e-5)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, oc_pruner(features, keep=KEEP, fill_scores=scores).indices)
