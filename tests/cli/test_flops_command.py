"""``ocvtp flops``."""

from __future__ import annotations

import json

import pytest

from ocvtp.cost.published import PUBLISHED
from tests.cli.test_commands import run


def test_json_has_both_accountings() -> None:
    found = json.loads(run("flops", "--model", "llava-1.5-7b", "--keep", "64", "--json"))
    assert (found["model"], found["keep"], found["text_tokens"]) == ("llava-1.5-7b", 64, 32)
    assert set(found["paper"]) == {"unpruned_tflops", "pruned_tflops", "ratio"}
    assert [round(found["paper"][f"{which}_tflops"], 2) for which in ("unpruned", "pruned")] == [6.31, 0.97]
    parts = {"vision_tower", "pruner", "projector", "merging", "prefill", "head"}
    parts |= {"decode_step", "first_token"}
    assert set(found["full"]["unpruned"]) == set(found["full"]["pruned"]) == parts
    whole = found["full"]["pruned"]
    assert whole["first_token"] == pytest.approx(
        sum(whole[p] for p in parts - {"first_token", "decode_step"})
    )


def test_what_becomes_of_dropped_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    config = PUBLISHED["llava-1.5-7b"].config()
    config.text_config.num_hidden_layers = 1
    monkeypatch.setattr("ocvtp.commands.flops._config", lambda _: (config, None))
    asked = ("flops", "--model", "llava-1.5-7b", "--keep", "64")
    found = json.loads(run(*asked, "--merge", "projected", "--no-weigh", "--json"))
    assert (found["merge"], found["weigh"]) == ("projected", False)
    unpruned, pruned = (found["full"][which] for which in ("unpruned", "pruned"))
    assert pruned["projector"] == unpruned["projector"] > found["full"]["thrown_away"]["projector"]
    assert pruned["merging"] > 0 == unpruned["merging"]
    shown = " ".join(run(*asked, "--merge", "features", "--accounting", "full").split())
    assert "merged before the projector" in shown
    assert "dropped tokens into kept ones" in shown


def test_the_papers_accounting_has_the_full_count_beside_it() -> None:
    output = " ".join(
        run("flops", "--model", "llava-next-7b", "--keep", "160", "--accounting", "paper").split()
    )
    assert "33.76" in output
    assert "1.95" in output
    assert "three FFN matrices" in output
    assert "vision tower" not in output
    full = run("flops", "--model", "llava-next-7b", "--keep", "0.25", "--accounting", "full")
    assert "vision tower" in full
    assert "720 of 2880" in full
    assert "33.76" not in full


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "llava-2"],
            "no folder 'llava-2' here; give a model's folder, Hub id, or one of llava-1.5-7b",
        ),
        (["--model", "llava-1.5-7b", "--keep", "600"], "keep"),
        (["--model", "llava-1.5-7b", "--merge", "mean"], "'mean' is not one of"),
        (["--model", "llava-1.5-7b", "--text-tokens", "0"], "--text-tokens must be at least 1"),
        (["--model", "qwen2.5-vl-3b", "--image", "wide"], "--image must be HEIGHTxWIDTH"),
        (["--model", "qwen2.5-vl-3b", "--image", "100x100"], "multiples of 28 pixels"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    assert message in run("flops", *arguments, code=2)
