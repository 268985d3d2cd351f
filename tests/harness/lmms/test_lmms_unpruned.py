"""``pruner=none`` is the model as it came: unpatched, and it says what lmms-eval's own class does."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.harness.lmms.conftest import Runs

pytest.importorskip("lmms_eval", reason="needs lmms-eval: make test-eval")

import ocvtp
from tests.harness.lmms.asking import ocvtp_model
from tests.vlm.hub_folders import write_folder

#: One picture, text of the picture in the prompt, several pictures, and pictures between words.
TASKS = ("pope", "textvqa_val", "seedbench", "mmmu_val")
OPTIONS = {"gen_kwargs": "max_new_tokens=6"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaVA-1.5 of random weights."""
    return write_folder(tmp_path_factory.mktemp("hub"), "llava-hf/llava-1.5-7b-hf")


@pytest.fixture(params=["decord", "a stand-in for decord"])
def llava_hf(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lmms-eval's class. Its module imports a reader of videos that is no requirement of lmms-eval."""
    names = ("lmms_eval.models.simple.llava_hf", "lmms_eval.models.chat.llava_hf")
    if request.param == "decord":
        pytest.importorskip("decord", reason="lmms-eval's llava_hf needs decord to be imported")
    else:
        stand_in = types.ModuleType("decord")
        stand_in.VideoReader = stand_in.cpu = None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "decord", stand_in)
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(names[1]).LlavaHf
    for name in names:
        sys.modules.pop(name, None)


def test_it_says_what_lmms_evals_own_class_says(run: Runs, folder: Path, llava_hf: Any) -> None:
    ours = run(f"pretrained={folder},pruner=none", TASKS, 3, **OPTIONS)
    model = llava_hf(pretrained=str(folder), device="cpu", device_map="cpu", dtype="float32")
    theirs = run(model, TASKS, **OPTIONS)
    said = set()
    for task in TASKS:
        want = theirs.answers(task)
        assert None not in theirs.counts(task)  # as after an exception, to which it answers nothing
        assert ours.answers(task) == want, task
        said.update(want)
    assert len(said) > 6  # a model that says one thing would prove nothing


def test_nothing_is_patched(folder: Path) -> None:
    lm = ocvtp_model(f"pretrained={folder},pruner=none")
    assert lm.report is None
    assert not {"forward", "generate"} & lm.model.__dict__.keys()
    with pytest.raises(ocvtp.vlm.PatchError):
        ocvtp.vlm.select(lm.model, None)
    patched = ocvtp_model(f"pretrained={folder},keep=4")
    assert {"forward", "generate"} <= patched.model.__dict__.keys()
