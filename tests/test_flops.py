"""Counting operations: the paper's figures, closed forms, two counters, and what really runs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ocvtp
from bench import flops as bench_flops
from bench import snapshot
from bench.e2e.prompts import prompt
from bench.rivals import flops as rival_flops
from bench.tower.encoder import ENCODERS
from ocvtp.cost import flops
from ocvtp.cost.counters import counter_of
from ocvtp.cost.flops import count, paper_flops
from ocvtp.cost.published import PUBLISHED
from tests.vlm.family import families

LAYERS, WIDTH, FFN = 32, 4096, 11008
#: Parameters of the models on the Hub.
SIZES = {
    "llava-1.5-7b": 7_063_427_072,
    "llava-1.5-13b": 13_351_494_656,
    "llava-next-7b": 7_063_431_168,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_make_the_published_models(name: str) -> None:
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(PUBLISHED[name].config())
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[name]


@pytest.mark.parametrize(
    ("visual", "tflops"), [(2880, 33.76), (160, 1.95), (576, 6.31), (64, 0.97), (128, 1.62), (192, 2.28)]
)
def test_the_papers_figures(visual: int, tflops: float) -> None:
    assert round(paper_flops(LAYERS, WIDTH, FFN, visual + 32) / 1e12, 2) == tflops


def language_model(tokens: int, kv: int, width: int, ffn: int, layers: int, held: int = 0) -> int:
    """Projections of queries and outputs, of keys and values, both attention products, three FFN matrices."""
    attention = 2 * tokens * width * (2 * width + 2 * kv) + 4 * tokens * (tokens + held) * width
    return layers * (attention + 6 * tokens * width * ffn)


def slots(tokens: int, kept: int, updates: int) -> int:
    """The published pruner with folded weights: encoder, logits, weighted means, GRU and MLP of the slots."""
    attention, gates = tokens * kept * 512, 3 * kept * 512**2
    encoder = tokens * (1024 * 2048 + 2048 * 512)
    update = attention + gates + kept * 512 * (2 * 2048 + 512)
    return 2 * (encoder + (updates + 1) * attention + updates * update + (updates - 1) * gates)


@pytest.fixture(scope="module")
def llava() -> flops.Cost:
    return count(PUBLISHED["llava-1.5-7b"].config(), 64, 32, merge="off", weigh=False)


def test_llava_part_by_part(llava: flops.Cost) -> None:
    assert (llava.image_tokens, llava.prompt_tokens) == (576, (608, 96))
    clip = ENCODERS["clip-l-336"]
    assert (llava.unpruned.vision_tower, llava.pruned.vision_tower) == (clip.upto(24), clip.upto(23))
    for parts, rows, tokens in ((llava.unpruned, 576, 608), (llava.pruned, 64, 96)):
        assert parts.projector == 2 * rows * (1024 * WIDTH + WIDTH * WIDTH)
        assert parts.prefill == language_model(tokens, WIDTH, WIDTH, FFN, LAYERS)
        assert parts.head == 2 * WIDTH * 32064
        step = language_model(1, WIDTH, WIDTH, FFN, LAYERS, held=tokens)
        assert parts.decode_step == step + parts.head
    # Queries and keys projected once more, their product, and what the pruner's kernels compute.
    scores = 4 * 577 * 1024**2 + 2 * 577**2 * 1024
    assert llava.pruned.pruner == scores + slots(576, 64, updates=2)
    assert llava.unpruned.pruner == 0
    assert llava.to_dict()["paper"] == pytest.approx(
        {"unpruned_tflops": 6.314, "pruned_tflops": 0.971, "ratio": 0.1538}, rel=1e-3
    )


def test_qwen_has_fewer_keys_than_queries() -> None:
    cost = count(PUBLISHED["qwen2.5-vl-3b"].config(), 0.25, 50, (336, 336), merge="off", weigh=False)
    assert (cost.image_tokens, cost.keep, cost.prompt_tokens) == (144, 36, (194, 86))
    text = PUBLISHED["qwen2.5-vl-3b"].text
    sizes = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    assert cost.unpruned.prefill == language_model(194, 256, *sizes)
    assert cost.pruned.prefill == language_model(86, 256, *sizes)
    assert cost.pruned.projector == cost.unpruned.projector // 4
    assert cost.pruned.vision_tower == cost.unpruned.vision_tower  # Qwen reads its last block


def test_next_counts_tiles_and_newlines() -> None:
    cost = count(PUBLISHED["llava-next-7b"].config(), 160, 32, (672, 672))
    # Five pictures; unpruned, 48 newlines of the stitched tiles; pruned, one.
    assert (cost.image_tokens, cost.prompt_tokens) == (2880, (2880 + 48 + 32, 160 + 1 + 32))
    clip = ENCODERS["clip-l-336"]
    assert cost.unpruned.vision_tower == 5 * clip.upto(24)
    assert [round(one / 1e12, 2) for one in cost.paper] == [33.76, 1.95]
    assert cost.pruned.pruner > 27e9
    wide = count(PUBLISHED["llava-next-7b"].config(), 160, 32, (336, 672))
    assert wide.unpruned.vision_tower == 3 * clip.upto(24)


def assert_merging(found: int, tokens: int, kept: int, width: int) -> None:
    """Products of every token and every kept one; kernels count the additions of the means as well."""
    products = 2 * tokens * kept * width
    assert found in (products, products + tokens * width)


def shallow(name: str) -> Any:
    """A published model with a language model of one layer, which takes its time to count."""
    config = PUBLISHED[name].config()
    config.get_text_config().num_hidden_layers = 1
    return config


def test_dropped_tokens_are_merged_after_the_projector() -> None:
    """Which then has all tokens to do, as where their owners are found by what it makes of them."""
    config = shallow("llava-1.5-7b")
    plain = count(config, 64, 32, merge="off", weigh=False)
    both = count(config, 64, 32, merge="projected", weigh=True)
    weighed = count(config, 64, 32, merge="off", weigh=True)
    assert (both.unpruned, plain.pruned.merging) == (plain.unpruned, 0)
    assert plain.pruned == plain.thrown_away == both.thrown_away == weighed.thrown_away
    for cost in (both, weighed):
        assert cost.pruned.projector == cost.unpruned.projector == 2 * 576 * (1024 * WIDTH + WIDTH * WIDTH)
        # Weights are added to the mask of keys that there are anyway.
        for part in ("vision_tower", "pruner", "prefill", "head", "decode_step"):
            assert getattr(cost.pruned, part) == getattr(plain.pruned, part)
        others = plain.pruned.first_token - plain.pruned.projector
        assert cost.pruned.first_token == others + cost.pruned.projector + cost.pruned.merging
    assert_merging(both.pruned.merging, 576, 64, WIDTH)
    assert weighed.pruned.merging == 2 * 576 * 64 * WIDTH


def test_dropped_tokens_are_merged_before_the_projector() -> None:
    cost = count(shallow("llava-1.5-7b"), 64, 32, merge="features", weigh=False)
    assert cost.pruned.projector == 2 * 64 * (1024 * WIDTH + WIDTH * WIDTH)
    assert_merging(cost.pruned.merging, 576, 64, 1024)
    # Of two tiles and the whole picture of LLaVA-NeXT one choice is made.
    tiles = count(shallow("llava-next-7b"), 160, 32, (336, 672), merge="features")
    assert_merging(tiles.pruned.merging, 3 * 576, 160, 1024)


def test_unsaid_is_as_applied() -> None:
    """What becomes of dropped tokens is counted as ``apply`` has it by default."""
    (one,) = (each for each in families() if each.name == "llava")
    model, pruner = one.model("eager"), one.pruner()
    cost = count(model.config, 5, 9, pruner=pruner.config)
    report = ocvtp.apply(model, pruner, keep=5)
    assert (cost.merge, cost.weigh) == (report.merge, report.weigh)


def test_keeping_everything_costs_what_the_unpruned_model_costs() -> None:
    cost = count(PUBLISHED["llava-1.5-7b"].config(), 576, 32)
    assert cost.pruned == cost.thrown_away == cost.unpruned
    assert cost.to_dict()["full"]["ratio"] == 1.0


def test_an_image_of_fewer_tokens_keeps_all_of_them() -> None:
    """As ``apply`` has it, where images differ in size."""
    cost = count(PUBLISHED["llava-next-7b"].config(), 5000, 32)
    assert cost.keep == cost.image_tokens == 2880
    assert cost.pruned == cost.unpruned
    assert cost.paper[0] == cost.paper[1]


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-3b"])
def test_both_counters_agree(name: str) -> None:
    pytest.importorskip("fvcore")
    config, image = PUBLISHED[name].config(), (336, 336)
    config.get_text_config().num_hidden_layers = 2
    ours, theirs = (count(config, 32, 20, image, counter=c) for c in ("torch", "fvcore"))  # type: ignore[arg-type]
    assert ours == theirs
    assert ours.pruned.pruner > 0


def test_no_kernel_counts_as_nothing(llava: flops.Cost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without our formulas the pruner would cost its scores' projections alone."""
    from torch.utils import flop_counter

    without = {k: v for k, v in flop_counter.flop_registry.items() if "ocvtp" not in str(k)}
    monkeypatch.setattr(flop_counter, "flop_registry", without)
    assert count(PUBLISHED["llava-1.5-7b"].config(), 64, 32).pruned.pruner < llava.pruned.pruner / 3


@pytest.mark.parametrize(
    ("family", "image"), [("llava", (56, 56)), ("llava_next", (112, 112)), ("qwen2_5_vl", (84, 112))]
)
@pytest.mark.parametrize("merge", ["off", "projected", "features"])
def test_what_is_counted_is_what_runs(family: str, image: tuple[int, int], merge: Any) -> None:
    """On meta as on a CPU with values."""
    (one,) = (each for each in families() if each.name == family)
    model, pruner = one.model("eager"), one.pruner()
    inputs = prompt(model, image=image, text_tokens=9)
    weigh = merge == "projected"
    cost = count(model.config, 5, 9, image, pruner=pruner.config, merge=merge, weigh=weigh)
    assert (cost.merge, cost.weigh) == (merge, weigh)
    pixels = {name: inputs[name] for name in inputs if name.startswith(("pixel", "image"))}
    plain: dict[str, Any] = {"keep": 5, "backend": "torch", "merge": "off", "weigh": False}
    with ocvtp.pruned(model, pruner, **plain), torch.no_grad():
        ocvtp.vlm.select(model, **pixels)  # folds weights
        with FlopCounterMode(display=False) as choosing:
            ocvtp.vlm.select(model, **pixels)
    counter = FlopCounterMode(display=False)
    with ocvtp.pruned(model, pruner, **{**plain, "merge": merge, "weigh": weigh}), torch.no_grad(), counter:
        model(**inputs, logits_to_keep=1)
    merging = 0
    if merge != "off":
        width = model.config.get_text_config().hidden_size
        if merge == "features":
            width = model.config.vision_config.hidden_size * (4 if family == "qwen2_5_vl" else 1)
        merging = 2 * cost.image_tokens * 5 * width
        assert_merging(cost.pruned.merging, cost.image_tokens, 5, width)
    # PyTorch computes slots by other products than kernels do: the choice is left out of both.
    after = cost.pruned.projector + merging + cost.pruned.prefill + cost.pruned.head
    assert counter.get_total_flops() - choosing.get_total_flops() == after
    assert choosing.get_total_flops() > cost.pruned.vision_tower


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 577}, "keep"),
        ({"text_tokens": 0}, "text_tokens must be an int of at least 1; got 0"),
        ({"image": (224, 224)}, "takes images of 336 x 336 pixels"),
        ({"counter": "mine"}, "counter must be"),
        ({"merge": "means"}, "merge must be one of"),
        ({"weigh": "often"}, "weigh must be True, False"),
    ],
)
def test_what_can_t_be_counted(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count(PUBLISHED["llava-1.5-7b"].config(), **{"keep": 64, **arguments})


def test_models_that_can_t_be_counted() -> None:
    (gemma,) = (each for each in families() if each.name == "internvl")
    with pytest.raises(ValueError, match="can't count a 'internvl' model; these can be: llava, llava_next"):
        count(gemma.model().config)
    qwen = PUBLISHED["qwen2.5-vl-3b"].config()
    with pytest.raises(ValueError, match="say which"):
        count(qwen)
    with pytest.raises(ValueError, match="multiples of 28 pixels"):
        count(qwen, image=(100, 112))


def test_a_transformers_that_can_t_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """5.0 asks torch whether autocast is on for ``meta``, which is an error."""

    def run(*_: Any, **__: Any) -> Any:
        raise RuntimeError("unknown device type for autocast in get_autocast_dispatch_key_from_device_type")

    monkeypatch.setattr(flops, "encode", run)
    with pytest.raises(ValueError, match="pip install -U transformers"):
        count(PUBLISHED["llava-1.5-7b"].config())


def test_a_counter_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fvcore.nn", None)
    with pytest.raises(ImportError, match="pip install fvcore"):
        counter_of("fvcore")


@pytest.mark.parametrize(("model", "keep"), [("llava-1.5-7b", 64), ("llava-next-7b", 160)])
def test_committed_counts_are_what_is_counted(model: str, keep: int) -> None:
    row = bench_flops.counted(model, keep)
    committed = snapshot.read(bench_flops.PATH)["models"]
    assert committed[bench_flops.name_of(model, row)] == {"model": model, **row}
    assert len(committed) == sum(map(len, bench_flops.BUDGETS.values()))


def test_committed_counts_of_rivals_are_what_is_counted() -> None:
    committed = snapshot.read(rival_flops.PATH)["models"]
    found = rival_flops.counted("llava-1.5-7b", ["tome", "fastv"])
    assert len(found) == 6
    assert {name: committed[name] for name in found} == found
    models = {row["model"] for row in committed.values()}
    assert models == set(rival_flops.BUDGETS)
    for row in committed.values():
        assert ("cannot" in row) == ("tflops" not in row)
        if "tflops" in row and isinstance(row["keep"], int):
            assert abs(row["average"] - row["keep"]) <= 3  # one budget means one thing, newline and all


def test_the_command_notices_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_flops, "BUDGETS", {"llava-1.5-7b": (64,)})
    # Three runs count the same, once.
    monkeypatch.setattr(bench_flops, "counted", functools.cache(bench_flops.counted))
    path = tmp_path / "flops.json"
    assert bench_flops.main(["--write", "--path", str(path)]) == 0
    assert bench_flops.main(["--path", str(path)]) == 0
    changed = json.loads(path.read_text())
    changed["models"]["llava-1.5-7b, keep 64"]["full"]["pruned"]["pruner"] *= 2
    path.write_text(json.dumps(changed))
    capsys.readouterr()
    assert bench_flops.main(["--path", str(path)]) == 1
    assert "llava-1.5-7b, keep 64: full.pruned.pruner 0.0156" in capsys.readouterr().out
