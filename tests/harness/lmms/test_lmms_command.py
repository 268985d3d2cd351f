"""The command, in a process of its own: what it finds, writes, and refuses to write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed here: make test-eval")

from bench.accuracy.loading import ASSETS, MODEL
from tests.harness.lmms.asking import ocvtp_model
from tests.harness.lmms.processes import lmms_eval, results, samples, words

SMALL: dict[str, object] = {"pretrained": MODEL, "dtype": "float32"}


def test_a_fresh_process_finds_the_model() -> None:
    code = (
        "from lmms_eval.models import get_model; import sys; assert 'ocvtp.harness.model' not in sys.modules;"
        "print(get_model('ocvtp').__module__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == "ocvtp.harness.model"


def test_the_results_file_tells_everything(testbed: Path, tmp_path: Path) -> None:
    pruner = ASSETS / "testbed-pruner"
    ran = lmms_eval(words(testbed, tmp_path, {**SMALL, "pruner": pruner, "keep": 28}, limit=6), tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = results(tmp_path)
    (record,) = found["config"]["batch_sizes"]
    assert record["settings"]["keep"] == 28
    assert record["settings"]["merge"] == "projected"
    assert record["settings"]["pretrained"] == str(MODEL)
    assert len(record["pruner"]["sha256"]) == 64
    assert record["report"]["tokens_after"] == 28
    assert set(record["versions"]) >= {"ocvtp", "torch", "transformers", "lmms_eval"}
    assert record["measured"]["kept_vision_tokens_per_image"] == 28
    assert record["measured"]["requests"] == 6
    assert found["throughput"]["avg_kept_vision_tokens_per_image"] == 28
    assert found["throughput"]["avg_seconds_per_image"] == record["measured"]["seconds_per_image"] > 0
    assert "[REDACTED]" not in str(record)
    rows = samples(tmp_path)
    assert len(rows) == 6
    for row in rows:
        (counts,) = row["token_counts"]
        assert (counts["vision_tokens"], counts["kept_vision_tokens"]) == (256, 28)


#: The model fails at its second batch, in the last process.
FAILS = """
import os
from transformers import LlavaForConditionalGeneration as Model
real, calls = Model.generate, []
def generate(self, *args, **kwargs):
    calls.append(0)
    if len(calls) > 1 and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        raise RuntimeError("out of luck")
    return real(self, *args, **kwargs)
Model.generate = generate
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_an_exception_leaves_no_results(testbed: Path, tmp_path: Path, processes: int) -> None:
    asked = words(testbed, tmp_path, {**SMALL, "pruner": "grid", "keep": 9}, limit=12)
    ran = lmms_eval(asked, tmp_path, before=FAILS, processes=processes)
    said = ran.stderr + ran.stdout
    assert "out of luck" in said
    assert "failed at ocvtp_testbed test" in said
    assert not list(tmp_path.rglob("*.json*"))
    if processes > 1:  # the other process waits for answers that don't come: it was ended
        assert ran.returncode != 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("keeep=3", "unknown in --model_args: keeep"),
        ("keep=257", "keep must be between 1 and 256"),
        ("pruner=none,keep=3", "keep"),
        (f"pruner={MODEL}", "pruner: "),
        ("chat_template=/nowhere.jinja", "nowhere.jinja is no file here"),
        ("attn_implementation=fast", "attn_implementation"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: str, named: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        ocvtp_model(f"pretrained={MODEL},{arguments}")
    assert named in str(caught.value)


def test_tasks_of_other_kinds_are_refused() -> None:
    model: Any = ocvtp_model(f"pretrained={MODEL}")
    with pytest.raises(NotImplementedError):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError):
        model.generate_until_multi_round([])
