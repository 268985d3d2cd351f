"""The end-to-end benchmark: its gate, its baselines, its modes, its file, rehearsed on small models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ocvtp
from bench.e2e import __main__ as command
from bench.e2e import gate
from bench.e2e.captured import BUCKET, captured_prefill, record_graph, record_nothing
from bench.e2e.measure import measure
from bench.e2e.memory import extra_bytes, held_bytes
from bench.e2e.methods import (
    INSIDES,
    MERGED,
    NAMES,
    OFFICIAL,
    OURS,
    UNPRUNED,
    VARIANTS,
    WEIGHED,
    Runner,
    default_variant,
    methods,
)
from bench.e2e.official import OfficialDataflow
from bench.e2e.presets import PRESETS, Cell, Preset, cells
from bench.e2e.prompts import prompt
from bench.micro.gates import GateError
from bench.official import official_attention, official_selection
from ocvtp import OCPruner
from tests.conftest import Golden, relative_error
from tests.fake_cuda import FakeCuda
from tests.vlm import tiny_llava
from tests.vlm.family import families

CPU = torch.device("cpu")
KEEP = 10
TEXT = 11
#: Family -> height and width of a picture, and its tokens.
PICTURES = {"llava": ((56, 56), 16), "llava_next": ((112, 112), 16 + 8 * 9), "qwen2_5_vl": ((84, 112), 12)}
each_family = pytest.mark.parametrize("family", PICTURES)


def build(family: str) -> tuple[Any, OCPruner, tuple[int, int], int]:
    (found,) = (one for one in families() if one.name == family)
    return found.model(), found.pruner(), *PICTURES[family]


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_llava.llava()


@pytest.fixture(scope="module")
def oc_pruner() -> OCPruner:
    return tiny_llava.pruner()


def tiny(**changes: Any) -> dict[str, Any]:
    return {"image": (56, 56), "text_tokens": TEXT, **changes}


# ------------------------------------------------------------------------------------------------- prompts


@each_family
def test_prompts_are_what_a_processor_would_make(family: str) -> None:
    model, _, image, tokens = build(family)
    inputs = prompt(model, image=image, text_tokens=TEXT, batch=2)
    ids = inputs["input_ids"]
    assert ids.shape == (2, tokens + TEXT)
    assert ((ids == model.config.image_token_id).sum(dim=1) == tokens).all()
    with torch.no_grad():
        assert model(**inputs).logits.shape[:2] == ids.shape
    assert torch.equal(ids, prompt(model, image=image, text_tokens=TEXT, batch=2)["input_ids"])
    three = prompt(model, image=image, text_tokens=TEXT, images=3)
    assert three["input_ids"].shape == (1, 3 * tokens + TEXT)
    with torch.no_grad():
        model(**three)


def test_a_video_in_a_prompt() -> None:
    model, _, image, tokens = build("qwen2_5_vl")
    inputs = prompt(model, image=image, text_tokens=TEXT, frames=6)
    assert inputs["input_ids"].shape == (1, 3 * tokens + TEXT)  # two frames make one
    with torch.no_grad():
        model(**inputs)
    with pytest.raises(ValueError, match="need more than 2 text tokens"):
        prompt(model, image=image, text_tokens=2)


# ------------------------------------------------------------------------------------------------- the gate


@each_family
@pytest.mark.parametrize("batch", [1, 2])
def test_everybody_passes_the_gate(family: str, batch: int) -> None:
    model, pruner, image, tokens = build(family)
    inputs = prompt(model, image=image, text_tokens=TEXT, batch=batch)
    found = methods(model, pruner, KEEP, tokens)
    checked = gate.check(model, pruner, KEEP, inputs, found)
    published = family != "qwen2_5_vl"
    assert (OFFICIAL in found) == published
    assert ("keeps 100.0% of the tokens that the official dataflow keeps" in " ".join(checked)) == published
    with pytest.raises(ocvtp.vlm.PatchError):  # everything is as it was
        ocvtp.vlm.call.controller.controller_of(model)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_the_gate_in_half_precision(family: str) -> None:
    """As on a GPU: kept tokens are compared with the vision side in float32, answers as they are."""
    model, pruner, image, tokens = build(family)
    model = model.bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = prompt(model, image=image, text_tokens=TEXT, batch=2)
    checked = gate.check(model, pruner, KEEP, inputs, methods(model, pruner, KEEP, tokens))
    assert "keeps 100.0% of the tokens that the official dataflow keeps" in " ".join(checked)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.model.vision_tower.dtype == torch.bfloat16


@each_family
def test_by_hand_kept_tokens_stand_for_the_others(family: str) -> None:
    """The reference is another in each variant, so that the gate can tell them apart."""
    model, pruner, image, tokens = build(family)
    inputs = prompt(model, image=image, text_tokens=TEXT, batch=2)
    features = gate._features(model, inputs)
    made = {}
    for name, how in VARIANTS.items():
        with ocvtp.pruned(model, pruner, keep=KEEP, **how):
            made[name] = gate.by_hand(model, inputs, features)
    rows = {name: one["inputs_embeds"] for name, one in made.items()}
    assert torch.equal(rows[MERGED], rows[WEIGHED])
    differ = (rows[OURS] != rows[MERGED]).any(dim=2).sum(dim=1)
    assert ((differ > 0) & (differ <= KEEP)).all()  # of text and newlines none
    seen = made[WEIGHED]["attention_mask"][:, 0, -1]  # by the last token: log of the masses
    assert ((seen == 0).sum(dim=1) >= TEXT).all()
    added = TEXT + method_rows(methods(model, pruner, KEEP, tokens)[OURS], tokens) - KEEP
    assert seen.exp().sum(dim=1).tolist() == pytest.approx([candidates(family) + added] * 2)


def candidates(family: str) -> int:
    """Tokens of a picture, of LLaVA-NeXT's without newlines."""
    return 16 + 8 * 8 if family == "llava_next" else PICTURES[family][1]


def test_other_owners_fail(llava: Any, oc_pruner: OCPruner, monkeypatch: pytest.MonkeyPatch) -> None:
    from ocvtp.vlm.encode import standing

    right = standing.nearest_kept

    def wrong(compare: torch.Tensor, indices: torch.Tensor, *rest: Any, **options: Any) -> Any:
        owner, _ = right(compare, indices, *rest, **options)
        dropped = next(i for i in range(16) if i not in indices[0])
        owner[0, dropped] = (owner[0, dropped] + 1) % KEEP
        return owner, torch.nn.functional.one_hot(owner, KEEP).sum(dim=1).float()

    monkeypatch.setattr(standing, "nearest_kept", wrong)
    fails(llava, oc_pruner, "owners: squared distance beyond the nearest's")


def test_other_masses_fail(llava: Any, oc_pruner: OCPruner, monkeypatch: pytest.MonkeyPatch) -> None:
    from ocvtp.vlm.encode import standing

    right = standing.nearest_kept

    def wrong(*args: Any, **options: Any) -> Any:
        owner, mass = right(*args, **options)
        return owner, mass + 1

    monkeypatch.setattr(standing, "nearest_kept", wrong)
    fails(llava, oc_pruner, "masses: 10 of 10 differ|masses: 5 of 5 differ")


@pytest.mark.parametrize(("what", "name"), [("means", MERGED), ("weights", WEIGHED)])
def test_other_means_and_weights_fail(
    llava: Any, oc_pruner: OCPruner, what: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is noticed in the first variant that has it."""
    from ocvtp.vlm.call import weighing
    from ocvtp.vlm.encode import standing

    if what == "means":
        right = standing.merge_tokens

        def wrong(*args: Any, **options: Any) -> Any:
            merged = right(*args, **options)
            return merged._replace(rows=1.01 * merged.rows)

        monkeypatch.setattr(standing, "merge_tokens", wrong)
    else:
        columns = weighing.Weights._columns
        monkeypatch.setattr(weighing.Weights, "_columns", lambda *args: 0.9 * columns(*args))
    fails(llava, oc_pruner, f"^{name}: (logits|token)")


def test_which_variant_is_the_default(llava: Any, oc_pruner: OCPruner) -> None:
    name = default_variant(llava, oc_pruner, KEEP)
    with ocvtp.pruned(llava, oc_pruner, keep=KEEP) as report:
        assert VARIANTS[name] == {"merge": report.merge, "weigh": report.weigh}


def test_how_many_tokens_may_differ() -> None:
    gpu = torch.device("cuda")
    assert gate.least_share(64, CPU) == 1.0
    assert [round(keep * (1 - gate.least_share(keep, gpu))) for keep in (16, 64, 160)] == [1, 3, 8]


def fails(model: Any, pruner: OCPruner, match: str) -> None:
    inputs = prompt(model, **tiny(batch=2))
    with pytest.raises(GateError, match=match):
        gate.check(model, pruner, KEEP, inputs, methods(model, pruner, KEEP, 16))


def test_other_kept_tokens_fail(llava: Any, oc_pruner: OCPruner, monkeypatch: pytest.MonkeyPatch) -> None:
    right = official_selection

    def wrong(attention: torch.Tensor, received: torch.Tensor, keep: int) -> list[int]:
        kept = right(attention, received, keep)
        return sorted({*kept[1:], next(i for i in range(16) if i not in kept)})

    monkeypatch.setattr("bench.e2e.official.official_selection", wrong)
    fails(llava, oc_pruner, "90.00% of the kept tokens are the official dataflow's, fewer than 100%")


def test_other_tokens_fail(llava: Any, oc_pruner: OCPruner, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Runner.answer

    def wrong(*args: Any) -> Any:
        tokens, logits = right(*args)
        return (tokens + 1) % tiny_llava.VOCAB, logits

    monkeypatch.setattr(Runner, "answer", wrong)
    fails(llava, oc_pruner, "ocvtp: token 0 of row 0 is")


def test_other_logits_fail(llava: Any, oc_pruner: OCPruner, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Runner.answer

    def wrong(*args: Any) -> Any:
        tokens, logits = right(*args)
        return tokens, logits * 1.001

    monkeypatch.setattr(Runner, "answer", wrong)
    fails(llava, oc_pruner, "ocvtp: logits: relative error 1.0.e-03")


def test_a_patch_that_changes_the_unpruned_model_fails(
    llava: Any, oc_pruner: OCPruner, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ocvtp.pruned
    monkeypatch.setattr(ocvtp, "pruned", lambda model, who, keep, **o: right(model, who, keep=KEEP, **o))
    fails(llava, oc_pruner, "ocvtp, all tokens kept: ")


def test_an_answer_may_part_where_rounding_decides() -> None:
    logits = torch.tensor([[[1.0, 0.99999, 0.0], [0.0, 1.0, 0.0]]])
    want = gate.Answer(torch.tensor([[0, 1]]), logits)
    gate._agree("x", torch.tensor([[1, 0]]), want, 1e-4)  # a near tie, and what follows from it
    with pytest.raises(GateError, match="token 1 of row 0 is 0, by hand it is 1"):
        gate._agree("x", torch.tensor([[0, 0]]), want, 1e-4)


# --------------------------------------------------------------------------------------- official dataflow


def test_official_attention_is_the_official_implementations(golden: Golden) -> None:
    pruner = OCPruner.from_official(golden.state, decoder_heads=golden.config["transformer_nhead"])
    attention = official_attention(golden.tensors["x"], golden.tensors["slots_init"], pruner.weights())
    assert relative_error(attention, golden.tensors["attn"]) <= 1e-5
    assert torch.equal(attention.argmax(dim=2), golden.tensors["top1"])


def test_official_selection_is_the_official_implementations(
    golden_selection: dict[str, torch.Tensor],
) -> None:
    received = golden_selection["tower_attn"].mean(dim=1).mean(dim=1)[:, 1:]
    attention = golden_selection["slot_attn"]
    for kept in (tensor for name, tensor in golden_selection.items() if name.startswith("kept_")):
        for image in range(len(kept)):
            found = official_selection(attention[image : image + 1], received[image], kept.shape[1])
            assert found == kept[image].tolist()


def test_official_dataflow_is_for_the_published_families(oc_pruner: OCPruner) -> None:
    model, pruner, _, _ = build("qwen2_5_vl")
    with pytest.raises(ValueError, match="no published code runs this qwen2_5_vl"):
        OfficialDataflow(model, pruner, KEEP)
    with pytest.raises(ValueError, match="no published code runs this llava"):
        OfficialDataflow(tiny_llava.llava(layer=[-2, -3]), oc_pruner, KEEP)


def test_official_dataflow_leaves_the_model_alone(llava: Any, oc_pruner: OCPruner) -> None:
    inputs = prompt(llava, **tiny())
    with torch.no_grad():
        before = llava(**inputs).logits
    dataflow = OfficialDataflow(llava, oc_pruner, KEEP, tf32=True)
    dataflow.encode(inputs)
    assert torch.get_float32_matmul_precision() == "highest"
    with torch.no_grad():
        assert torch.equal(llava(**inputs).logits, before)
    assert llava.model.vision_tower.config._attn_implementation == "sdpa"


# --------------------------------------------------------------------------------------- captured prefill


@each_family
def test_captured_prefill_computes_the_same(family: str) -> None:
    model, pruner, image, tokens = build(family)
    for method in methods(model, pruner, KEEP, tokens).values():
        with method.active() as runner:
            short, longer = (
                prompt(model, image=image, text_tokens=text, batch=2) for text in (TEXT, TEXT + 7)
            )
            want = [runner.forward(inputs).logits for inputs in (short, longer, short)]
            with captured_prefill(model, record_nothing) as captured:
                got = [runner.forward(inputs).logits.clone() for inputs in (short, longer, short)]
            for one, other in zip(got, want, strict=True):
                assert relative_error(one, other) <= 1e-5
            assert captured.graphs == len({-(-(n + method_rows(method, tokens)) // BUCKET) for n in (11, 18)})
    assert "forward" not in model.model.language_model.__dict__


def test_a_prefill_that_cant_be_captured_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)

    def work() -> int:
        if cuda.capturing:
            raise RuntimeError("CUDA out of memory")
        return 3

    cuda.fails = ["end"]
    with pytest.raises(RuntimeError, match="out of memory"):
        record_graph(work)
    assert cuda.left() == []
    result, replay = record_graph(lambda: 3)
    replay()
    assert result == 3


def method_rows(method: Any, tokens: int) -> int:
    """Rows of a picture in the prompt: LLaVA-NeXT has a newline besides."""
    newline = tokens == PICTURES["llava_next"][1] and method.name != UNPRUNED
    return method.keep + newline


# ------------------------------------------------------------------------------------------------ measuring


@pytest.mark.parametrize("mode", ["eager", "static cache", "captured prefill"])
@each_family
def test_rows(family: str, mode: Any) -> None:
    model, pruner, image, tokens = build(family)
    cell = Cell(mode, 2, TEXT)
    inputs = prompt(model, image=image, text_tokens=TEXT, batch=2)
    found = methods(model, pruner, KEEP, tokens)
    rows = measure(cell, inputs, found, decode_tokens=2, rounds=2, calls=2, record=record_nothing)
    assert [row["method"] for row in rows] == list(found)
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * width * 4
    for row, method in zip(rows, found.values(), strict=True):
        assert row["prompt_tokens"] == TEXT + method_rows(method, tokens)
        assert row["kv_bytes"] == 2 * row["prompt_tokens"] * per_token
        assert row["ttft_ms"]["calls"] == (2 if mode == "static cache" else 4)
        assert row["ttft_ms"]["median"] > row["prefill_ms"]["median"] > 0
        assert (row["decode_tokens_per_s"] is None) == (mode == "captured prefill")
        stages = {"vision tower", "projector"} if family != "qwen2_5_vl" else {"vision tower"}
        if method.name != UNPRUNED:
            stages = {"vision tower", "pruner", "projector"}
        if method.name == "ToMe" and family != "qwen2_5_vl":  # in the tower
            stages.remove("pruner")
        assert set(row["vision_ms"]) == stages
        assert all(timing["median"] > 0 for timing in row["vision_ms"].values())
        assert row["ttft_ms"]["median"] >= sum(t["median"] for t in row["vision_ms"].values()) * 0.5
        assert row["peak_bytes"] > held_bytes(CPU, model)


def test_methods_inside_the_language_model() -> None:
    torch.manual_seed(0)
    config = tiny_llava.llava().config
    config.text_config.num_hidden_layers = 16
    model = type(tiny_llava.llava())(config).eval()
    inputs = prompt(model, image=(56, 56), text_tokens=TEXT, batch=1)
    found = methods(model, tiny_llava.pruner(), KEEP, 16)
    assert set(INSIDES) <= set(found)
    inside = {name: found[name] for name in INSIDES}
    assert "tensors of the official code" in " ".join(
        gate.check(model, tiny_llava.pruner(), KEEP, inputs, inside)
    )
    for row in measure(Cell("eager", 1, TEXT), inputs, inside, decode_tokens=2, rounds=1, calls=1):
        assert abs(row["prompt_tokens"] - TEXT - KEEP) <= 1
        assert row["kv_bytes"] < (TEXT + 16) * 16 * 2 * 2 * 12 * 4


def test_peak_memory_sees_what_is_freed_again() -> None:
    def work() -> None:
        one = torch.ones(2**20)
        two = one + 1
        del one
        three = two.clone()
        three.add_(two)

    assert extra_bytes(CPU, work) == extra_bytes(CPU, work)
    assert 2 * 2**22 <= extra_bytes(CPU, work) <= 2 * 2**22 + 1024
    assert held_bytes(CPU, torch.nn.Linear(8, 8)) == 4 * 72


def test_published_presets_cover_what_is_promised() -> None:
    assert set(PRESETS) == {"cpu-small", "llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b"}
    settings = cells((1, 8), (32, 256))
    assert {cell.mode for cell in settings} == {"eager", "static cache", "captured prefill"}
    assert {(cell.batch, cell.text_tokens) for cell in settings} == {(1, 32), (8, 32), (1, 256), (8, 256)}
    assert all(cell.methods is None or set(cell.methods) <= set(NAMES) for cell in settings)


# ------------------------------------------------------------------------------------------------- command


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> Preset:
    config = tiny_llava.llava().config
    own = Preset(
        "tiny",
        lambda: config,
        (56, 56),
        KEEP,
        (Cell("eager", 1, TEXT), Cell("eager", 2, TEXT, (UNPRUNED, OURS))),
        decode_tokens=2,
        rounds=1,
        calls=1,
        gpu=False,
    )
    monkeypatch.setitem(command.PRESETS, "tiny", own)
    return own


def start(folder: Path, *extra: str) -> tuple[int, dict[str, Any]]:
    code = command.main(["--preset", "tiny", "--record", "--results", str(folder), *extra])
    (path,) = folder.glob("*/e2e-tiny.json")
    return code, json.loads(path.read_text())


@pytest.mark.usefixtures("preset")
def test_the_file_and_what_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Cell] = []
    right = command.measure

    def counted(cell: Cell, *args: Any, **kwargs: Any) -> Any:
        measured.append(cell)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return right(cell, *args, **kwargs)

    monkeypatch.setattr(command, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, "--commit", "abc")
    code, first = start(tmp_path, "--commit", "abc", "--minutes", "0")
    assert code == 3
    code, record = start(tmp_path, "--commit", "abc")
    assert code == 0
    assert [cell.batch for cell in measured] == [1, 2, 2]
    assert record["rows"][: len(first["rows"])] == first["rows"]
    assert [row["method"] for row in record["rows"]] == [
        *(n for n in NAMES if n not in INSIDES),
        UNPRUNED,
        OURS,
    ]
    assert (record["preset"], record["commit"], record["dtype"]) == ("tiny", "abc", "float32")
    assert (record["image_tokens"], record["keep"]) == (16, KEEP)
    assert record["parameters"]["vision"] > 0
    assert record["default"] in VARIANTS
    assert any("prompt shortened by hand" in sentence for sentence in record["gate"])


@pytest.mark.usefixtures("preset")
def test_no_figure_without_a_green_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Runner, "answer", lambda *_: (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, tiny_llava.VOCAB))
    )
    with pytest.raises(SystemExit, match="gate failed at tiny: "):
        command.main(["--preset", "tiny", "--record", "--results", str(tmp_path)])
    assert not list(tmp_path.glob("*/*.json"))


@pytest.mark.parametrize(
    ("name", "image"),
    [("llava-1.5-7b", (112, 112)), ("llava-next-7b", (224, 112)), ("qwen2.5-vl-7b", (168, 168))],
)
def test_rehearsal_of_what_a_gpu_will_run(
    name: str, image: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cell of a full-size preset, its whole way to the file, on a tiny model of its family."""
    small = PRESETS[name]

    def config() -> Any:
        """Of LLaVA's, with a third of its towers' edges: 64 tokens a tile."""
        made = small.config()
        if "llava" in name:
            made.vision_config.image_size, made.image_seq_length = 112, 64
        if name == "llava-next-7b":
            made.image_grid_pinpoints = [
                [height // 3, width // 3] for height, width in made.image_grid_pinpoints
            ]
        return made

    preset = dataclasses.replace(small, keep=20, image=image, config=config)
    monkeypatch.setitem(command.PRESETS, name, preset)
    arguments = ["--preset", name, "--rehearse", "--record", "--results", str(tmp_path), "--device", "cpu"]
    assert command.main(arguments) == 0
    (path,) = tmp_path.glob(f"*/e2e-{name}.json")
    record = json.loads(path.read_text())
    assert "rehearsal" in record["note"]
    want = {
        (cell.mode, cell.batch, cell.text_tokens, method)
        for cell in small.cells
        for method in cell.methods or NAMES
        if method not in INSIDES and ("llava" in name or method not in (OFFICIAL, "FasterVLM"))
    }
    rows = record["rows"]
    assert {(row["mode"], row["batch"], row["text_tokens"], row["method"]) for row in rows} == want


def test_full_size_presets_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--preset", "llava-next-7b", "--device", "cpu"])
    assert "needs a GPU; on a CPU: --preset cpu-small" in capsys.readouterr().err
