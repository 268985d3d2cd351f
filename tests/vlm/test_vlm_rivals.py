"""Methods of others through ``ocvtp.apply``. What they compute is held against their authors' tensors in
``tests/methods`` and ``bench.rivals``; here it is how they sit in a call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from packaging.version import Version

import ocvtp
from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.rivals import CDPruner, HiPrune, Trim, VisionZip, VisPruner
from ocvtp.vlm.rivals.catalog import METHODS
from ocvtp.vlm.rivals.text import LanguageText
from ocvtp.vlm.towers.clip import run_tower
from ocvtp.vlm.towers.tome import run_merging_tower
from tests.vlm.family import by_name, families, packed
from tests.vlm.skips import VERSION, needs_original
from tests.vlm.tiny_llava import GREEDY, ONE, TOKENS, llava, mixed, pixels, prompt

READERS = ("trim", "cdpruner")  # of the question, for which a tiny LLaVA has no text tower
FAMILIES = {"llava": 6, "llava_next": 12, "qwen2_5_vl": 5}  # and a budget below all of their images


def method(name: str) -> str | Reducer:
    return METHODS[name]("language_model") if name in READERS else name  # type: ignore[call-arg]


def pairs() -> list[tuple[str, str]]:
    return [(family, name) for family in FAMILIES for name in METHODS if family in METHODS[name].families]


def new_tokens(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return model.generate(**inputs, **GREEDY)[:, -GREEDY["max_new_tokens"] :]


@pytest.mark.parametrize(("family", "name"), pairs())
def test_a_batch_of_prompts_equals_each_alone(family: str, name: str) -> None:
    some = by_name(family)
    model = some.model()
    kinds = ["one", "two", "text"]
    rows = some.rows()
    unpruned = new_tokens(model, rows["two"])
    columns = rows["two"]["input_ids"].shape[1]
    ocvtp.apply(model, method(name), keep=FAMILIES[family])
    batch = new_tokens(model, some.batch(kinds))
    alone = torch.cat([new_tokens(model, rows[kind]) for kind in kinds])
    assert torch.equal(batch, alone)
    with torch.no_grad():
        assert model(**rows["two"]).logits.shape[1] < columns
    ocvtp.remove(model)
    assert torch.equal(new_tokens(model, rows["two"]), unpruned)


@pytest.mark.parametrize(("family", "name"), pairs())
def test_who_keeps_all_tokens_changes_no_bit(family: str, name: str) -> None:
    model = by_name(family).model()
    inputs = by_name(family).rows()["one"]
    with torch.no_grad():
        before = model(**inputs).logits
        ocvtp.apply(model, method(name), keep=1.0)
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = llava().to(dtype)
    ocvtp.apply(model, method(name), keep=6)
    with torch.no_grad():
        logits = model(**prompt(ONE, pixels(1).to(dtype))).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert logits.shape[1] == len(ONE) - TOKENS + 6


@pytest.mark.parametrize("name", ["visionzip", "prumerge", "prumerge+", "tome"])
def test_rows_reach_the_language_model_in_the_methods_order(name: str) -> None:
    model = llava()
    ocvtp.apply(model, name, keep=6)
    selection = ocvtp.vlm.select(model, pixels(1))
    assert selection.reduction is not None
    with torch.no_grad():
        pruned = model(**prompt(ONE, pixels(1))).logits
    ocvtp.remove(model)
    with torch.no_grad():
        text = model.get_input_embeddings()(torch.tensor([ONE]))
        start = ONE.index(120)
        rows = model.model.multi_modal_projector(selection.reduction.rows)
        embeds = torch.cat([text[:, :start], rows, text[:, start + TOKENS :]], dim=1)
        by_hand = model(inputs_embeds=embeds).logits
    torch.testing.assert_close(pruned, by_hand, rtol=1e-5, atol=1e-5)


def test_original_positions_put_rows_at_their_places() -> None:
    needs_original()
    model = llava()
    ocvtp.apply(model, "visionzip", keep=6, positions="original")
    reduction = ocvtp.vlm.select(model, pixels(1)).reduction
    assert reduction is not None
    placed = reduction.by_place()
    start = ONE.index(120)
    with torch.no_grad():
        pruned = model(**prompt(ONE, pixels(1))).logits
    ocvtp.remove(model)
    columns = [*range(start), *(start + placed.slots[0]).tolist(), *range(start + TOKENS, len(ONE))]
    with torch.no_grad():
        text = model.get_input_embeddings()(torch.tensor([ONE]))
        rows = model.model.multi_modal_projector(placed.rows)
        embeds = torch.cat([text[:, :start], rows, text[:, start + TOKENS :]], dim=1)
        by_hand = model(
            inputs_embeds=embeds,
            position_ids=torch.tensor([columns]),
            attention_mask=torch.ones(1, embeds.shape[1], dtype=torch.int64),
        ).logits
    torch.testing.assert_close(pruned, by_hand, rtol=1e-5, atol=1e-5)


def test_a_selection_says_what_was_merged() -> None:
    model = llava()
    ocvtp.apply(model, "tome", keep=6)
    selection = ocvtp.vlm.select(model, pixels(2))
    assert selection.reduction is not None
    assert selection.owner is not None
    assert selection.mass is not None
    assert selection.indices.shape == (2, 6)
    assert (selection.indices.diff(dim=1) > 0).all()
    assert (selection.mass.sum(1) == TOKENS).all()
    for image in range(2):
        of_places = selection.owner[image, selection.indices[image]]
        assert of_places.tolist() == list(range(6))  # a row stands at one of its own tokens
    with pytest.raises(ValueError, match=r"rows are in reduction\.rows"):
        selection.gather(torch.zeros(2, TOKENS, 3))


@pytest.mark.parametrize("name", METHODS)
def test_each_tile_keeps_its_share(name: str) -> None:
    family = by_name("llava_next")
    model, inputs = family.model(), family.rows()["two"]
    ocvtp.apply(model, method(name), keep=13)
    vision = {key: inputs[key] for key in ("image_sizes",)}
    images = inputs["pixel_values"]
    for image in range(len(images)):
        one = {key: value[image : image + 1] for key, value in vision.items()}
        if name in READERS:
            continue
        selection = ocvtp.vlm.select(model, images[image : image + 1], **one)
        tiles = selection.tokens // TOKENS
        assert tiles > 1
        shares = torch.bincount(selection.indices[0] // TOKENS, minlength=tiles)
        if METHODS[name].pooled:
            assert shares.sum() == 13
        else:
            assert shares.tolist() == [13 // tiles] * tiles


def test_a_share_that_leaves_tiles_without_tokens_is_refused() -> None:
    family = by_name("llava_next")
    model = family.model()
    ocvtp.apply(model, "hiprune", keep=2)
    with pytest.raises(ValueError, match="its share of 2 tokens, which is none: keep at least"):
        model(**family.rows()["one"])


@pytest.mark.parametrize("name", ["hiprune", "visionzip", "tome"])
def test_later_turns(name: str) -> None:
    model = llava()
    ocvtp.apply(model, method(name), keep=6)
    images = pixels(2)
    second = [120] * TOKENS
    whole = prompt([*ONE, 31, *second, 32], images)
    with torch.no_grad():
        first = model(**prompt(ONE, images[:1]))
        later = model(**prompt([31, *second, 32], images[1:]), past_key_values=first.past_key_values)
        at_once = model(**whole).logits
    torch.testing.assert_close(later.logits, at_once[:, -later.logits.shape[1] :], rtol=1e-4, atol=1e-4)


def test_beams_and_copies() -> None:
    model = llava()
    ocvtp.apply(model, "visionzip", keep=6)
    batch, alone = mixed()
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    twin = copy.deepcopy(model)
    ocvtp.remove(model)
    for model_ in (twin,):
        found = model_.generate(**batch, **options)[:, -4:]
        assert torch.equal(found, torch.cat([model_.generate(**one, **options)[:, -4:] for one in alone]))


def test_a_rival_can_stand_for_what_it_drops() -> None:
    model = llava()
    plain = ocvtp.apply(model, "hiprune", keep=6)
    assert (plain.merge, plain.weigh) == ("off", False)
    logits = {}
    for options in ({}, {"merge": "projected", "weigh": True}):
        report = ocvtp.apply(model, "hiprune", keep=6, **options)
        with torch.no_grad():
            logits[report.weigh] = model(**prompt(ONE, pixels(1))).logits
    assert not torch.equal(logits[False], logits[True])
    selection = ocvtp.vlm.select(model, pixels(1))
    assert selection.mass is not None
    assert selection.mass.sum() == TOKENS


def test_reports_say_whose_method_it_is() -> None:
    told = str(ocvtp.apply(llava(), "visionzip", keep=6))
    assert "VisionZip" in told
    assert "as published, arXiv 2412.04467" in told
    assert "merged by its own rule" in told
    told = str(ocvtp.apply(llava(tower="siglip", strategy="full", layer=-1), "vispruner", keep=6))
    assert "our adaptation: attention received from all tokens" in told


def test_towers_without_a_class_token() -> None:
    model = llava(tower="siglip", strategy="full", layer=-1)
    for name in METHODS:
        if name == "tome":
            with pytest.raises(ValueError, match="ToMe needs a tower with a class token"):
                ocvtp.apply(model, name, keep=6)
            continue
        report = ocvtp.apply(model, method(name), keep=6)
        with torch.no_grad():
            assert model(**prompt(ONE, pixels(1))).logits.isfinite().all(), name
        expected = name not in ("hiprune", "divprune")
        assert ("our adaptation" in str(report)) == expected, name


def test_what_cannot_work_is_refused_before_anything_changes() -> None:
    model = llava()
    clean = dict(model.__dict__)
    for family in families():
        if family.name not in FAMILIES:
            with pytest.raises(ValueError, match=f"HiPrune has no proven form on {family.name}; it works on"):
                ocvtp.apply(family.model(), "hiprune", keep=4)
    with pytest.raises(
        ValueError, match=r"FasterVLM has no proven form on qwen2_5_vl.*On qwen2_5_vl: cdpruner"
    ):
        ocvtp.apply(by_name("qwen2_5_vl").model(), "fastervlm", keep=4)
    for name, needs in (("trim", "Trim"), ("cdpruner", "CDPruner")):
        with pytest.raises(ValueError, match=rf"no text tower: pass ocvtp\.vlm\.rivals\.{needs}\(ClipText"):
            ocvtp.apply(model, name, keep=4)
    for options, why in (
        ({"refine": 1}, "refine is for pruners and rules of our own, not for VisionZip"),
        ({"fill": "attention"}, "fill is for pruners"),
        ({"features": "early"}, "features is for pruners"),
        ({"tower": "kept_rows"}, 'VisionZip compares all of it: use tower="exact"'),
        ({"merge": "projected"}, "VisionZip merges tokens by its own rule"),
        ({"weigh": True}, "VisionZip merges tokens by its own rule"),
        ({"keep": "auto"}, "which needs a pruner"),
        ({"keep": TOKENS + 1}, "keep must be"),
    ):
        with pytest.raises(ValueError, match=why):
            ocvtp.apply(model, **{"pruner": "visionzip", "keep": 4, **options})
    with pytest.raises(TypeError, match='"visionzip"'):
        ocvtp.apply(model, "visionzap", keep=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"HiPrune reads attention over whole pictures.*\[0, 1, 2, 3, 4\]"):
        ocvtp.apply(model, HiPrune(object_layer=5), keep=4)
    assert model.__dict__ == clean


def test_what_the_configuration_alone_forbids() -> None:
    for made in (llava(layer=[1, 4]), llava(strategy="full")):
        with pytest.raises(ValueError, match="VisionZip is defined for one vision_feature_layer and"):
            ocvtp.apply(made, "visionzip", keep=4)
    with pytest.raises(ValueError, match=r"HiPrune needs tokens that are rows and columns.* 15 are not"):
        ocvtp.apply(llava(tower="siglip", layer=-1), "hiprune", keep=4)
    tiled = by_name("llava_next").model()
    early = Version("5.10") > VERSION
    why = (
        'positions="original" needs'
        if early
        else "HiPrune chooses among all tokens of all tiles, padding too"
    )
    with pytest.raises(ValueError, match=why):
        ocvtp.apply(tiled, "hiprune", keep=12, positions="original")
    with pytest.raises(ValueError, match="HiPrune puts all tiles' tokens together, with one newline"):
        ocvtp.apply(tiled, "hiprune", keep=12, newlines="rows")
    model = llava()
    for name in ("visionzip", "prumerge", "trim"):
        with pytest.raises(ValueError, match="in an order of its own, of which columns say nothing"):
            ocvtp.apply(model, method(name), keep=6, columns=True)
        if not early:
            ocvtp.apply(model, method(name), keep=6, columns=True, positions="original")
    ocvtp.apply(model, "tome", keep=6, columns=True)
    ocvtp.remove(model)
    for wrong, why in (
        (lambda: HiPrune(alpha=2), "alpha must be from 0 to 1"),
        (lambda: HiPrune(alpha="x"), "alpha must be a number"),
        (lambda: HiPrune(object_layer=True), "object_layer must be an int"),
        (lambda: VisPruner(important=5), "important must be from 0 to 1"),
        (lambda: VisPruner(step=0), "step must be"),
        (lambda: VisPruner(by="place"), "by must be"),
        (lambda: VisionZip(contextual=-1), "contextual must be"),
        (lambda: VisionZip(contextual=1.5), "contextual must be an int"),
    ):
        with pytest.raises((TypeError, ValueError), match=why):
            wrong()
    for settings, keep, why in (
        (VisionZip(contextual=4), 4, "VisionZip keeps 4 tokens, 4 of them means"),
        ("visionzip", 1, "VisionZip keeps 1 tokens, 0 of them means"),
        (HiPrune(alpha=1.0), 13, "alpha must be below"),
    ):
        with pytest.raises(ValueError, match=why):
            ocvtp.apply(model, settings, keep=keep)  # type: ignore[arg-type]


def test_what_only_a_call_can_tell() -> None:
    model = llava()
    ocvtp.apply(model, "hiprune", keep=4)
    with pytest.raises(ValueError, match="defined for one vision_feature_layer"):
        model(**prompt(ONE, pixels(1)), vision_feature_layer=[1, 4])
    ocvtp.apply(model, HiPrune(object_layer=3), keep=4)
    with pytest.raises(
        ValueError, match="attention of encoder layer 3 is asked for, and this call runs layers"
    ):
        model(**prompt(ONE, pixels(1)), vision_feature_layer=-4)
    ocvtp.apply(model, Trim("language_model"), keep=4)
    with pytest.raises(ValueError, match="reads the question, and there is no prompt here"):
        ocvtp.vlm.select(model, pixels(1))
    ocvtp.apply(model, "visionzip", keep=4)
    with pytest.raises(ValueError, match="VisionZip has no slots"):
        ocvtp.vlm.select(model, pixels(1), return_attention=True)


@pytest.mark.parametrize("name", METHODS)
def test_a_call_may_have_a_feature_layer_of_its_own(name: str) -> None:
    model, other = llava(), llava(layer=-3)
    made = HiPrune(object_layer=1) if name == "hiprune" else method(name)
    ocvtp.apply(model, made, keep=6)
    ocvtp.apply(other, HiPrune(object_layer=1) if name == "hiprune" else method(name), keep=6)
    with torch.no_grad():
        found = model(**prompt(ONE, pixels(1)), vision_feature_layer=-3).logits
        assert torch.equal(found, other(**prompt(ONE, pixels(1))).logits)


@pytest.mark.parametrize("name", READERS)
def test_a_question_is_words_and_nobodys_answer(name: str) -> None:
    model = llava()
    ocvtp.apply(model, method(name), keep=6)
    inputs = prompt(ONE, pixels(1))
    with torch.no_grad():
        asked = model(**inputs).logits
        answered = prompt([*ONE, 50, 51, 52], pixels(1))
        labels = answered["input_ids"].clone()
        labels[:, :-3] = -100
        taught = model(**answered, labels=labels).logits
        torch.testing.assert_close(taught[:, :-3], asked, rtol=1e-5, atol=1e-5)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="reads the question: pass input_ids, not inputs_embeds"):
            model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
        with pytest.raises(ValueError, match="no words beside its pictures"):
            model(**prompt([120] * TOKENS, pixels(1)))


@pytest.mark.parametrize("name", READERS)
def test_documents_in_one_row_have_no_question_of_their_own(name: str) -> None:
    some = by_name("llava")
    model, rows = some.model(), some.rows()
    ocvtp.apply(model, method(name), keep=6)
    with pytest.raises(ValueError, match="a row holds several documents: pass them as rows of their own"):
        model(**packed(some, model, [[rows["one"], rows["two"]]]), use_cache=False)


def test_a_question_has_no_placeholders_of_another_modality() -> None:
    some = by_name("qwen2_5_vl")
    model, rows = some.model(), some.rows()
    seen: list[torch.Tensor] = []

    class Spy(LanguageText):
        def compare(self, evidence: Any, questions: Any, *, pieces: bool) -> Any:
            seen.extend(questions)
            return super().compare(evidence, questions, pieces=pieces)

    ocvtp.apply(model, CDPruner(Spy(model)), keep=5)
    image, video = rows["one"], rows["video"]
    both = {
        **image,
        **video,
        "input_ids": torch.cat([image["input_ids"], video["input_ids"]], dim=1),
        "mm_token_type_ids": torch.cat([image["mm_token_type_ids"], video["mm_token_type_ids"]], dim=1),
    }
    with torch.no_grad():
        model(**both)
    assert len(seen) == 1 + len(image["image_grid_thw"]) or seen
    places = {model.config.image_token_id, model.config.video_token_id}
    assert all(not places & set(question.tolist()) for question in seen)


@pytest.mark.parametrize("name", READERS)
def test_offloaded_embeddings_are_fetched(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = llava()
    ocvtp.apply(model, method(name), keep=6)
    inputs = prompt(ONE, pixels(1))
    with torch.no_grad():
        here = model(**inputs).logits
        ocvtp.remove(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        ocvtp.apply(model, method(name), keep=6)
        assert torch.equal(model(**inputs).logits, here)


def test_kept_rows_serve_those_who_read_attention_alone() -> None:
    model = llava()
    for name in ("hiprune", "fastervlm"):
        selections = {}
        for tower in ("exact", "kept_rows"):
            ocvtp.apply(model, name, keep=6, tower=tower)
            selections[tower] = ocvtp.vlm.select(model, pixels(2)).indices
            with torch.no_grad():
                assert model(**prompt(ONE, pixels(1))).logits.isfinite().all()
        assert torch.equal(selections["exact"], selections["kept_rows"])


def test_questions_are_those_of_the_picture() -> None:
    """Two rows of a batch with the same picture and other words keep other tokens; as each alone does."""
    model = llava()
    ocvtp.apply(model, CDPruner("language_model"), keep=6)
    image = pixels(1)
    rows = [[1, 5, *[120] * TOKENS, *words] for words in ((7, 8, 9), (40, 41, 42))]
    batch = {"input_ids": torch.tensor(rows), "pixel_values": image.expand(2, -1, -1, -1)}
    with torch.no_grad():
        together = model(**batch).logits
        alone = torch.cat([model(**prompt(row, image)).logits for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_tower_that_merges_nothing_is_the_tower() -> None:
    tower = llava().model.vision_tower
    with torch.no_grad():
        merged = run_merging_tower(tower, pixels(2), [0] * 5)
        plain = run_tower(tower, pixels(2), {4}).outputs[4][:, 1:]
    torch.testing.assert_close(merged.rows, plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.owner, torch.arange(TOKENS).expand(2, -1))
    assert (merged.sizes == 1).all()


def test_merging_towers_keep_account_of_every_patch() -> None:
    tower = llava().model.vision_tower
    with torch.no_grad():
        merged = run_merging_tower(tower, pixels(2), [3, 3, 3])
    assert merged.rows.shape[1] == TOKENS - 9
    for owner, sizes in zip(merged.owner, merged.sizes, strict=True):
        assert torch.equal(torch.bincount(owner).float(), sizes)
        first = [int((owner == i).nonzero()[0]) for i in range(len(sizes))]
        assert first == sorted(first)
