"""Models whose weights come when a module is called: FSDP2 on two processes, accelerate, DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.vlm import PatchError
from ocvtp.vlm.families import adapter_for
from ocvtp.vlm.towers.clip import root
from tests.vlm.family import Family, families
from tests.vlm.skips import NATIVE_ROUTE
from tests.vlm.tiny_llava import KEEP, ONE, llava, pixels, prompt, pruner

ROOT = Path(__file__).parents[2]
NAMES = [family.name for family in families()]

# One tower of each kind. Idefics3's layers are sharded attention by attention.
CASES = ["llava/layers", "llava/whole_tower", "idefics3/layers", "internvl/tower", "qwen2_5_vl/tower"]
if NATIVE_ROUTE != "inputs_embeds":
    CASES.append("llava/layers/inputs_embeds")
CASES = [case for case in CASES if case.partition("/")[0] in NAMES]
EVERY = [f"{name}/every" for name in NAMES]


def two_processes(folder: Path, cases: list[str], seconds: int) -> list[dict[str, list[str]]]:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launch, "--module", "tests.vlm.sharded", folder, *cases],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,  # processes that wait for each other
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_half_a_model_each(tmp_path: Path) -> None:
    """``generate``, ``forward`` of every kind of choice, ``select`` and gradients; all at one start."""
    for one in two_processes(tmp_path, [*CASES, *EVERY], 900):
        assert one.keys() == {*CASES, *EVERY}
        faults = {case: said for case, said in one.items() if said}
        assert not faults, "\n".join(f"{case}: {line}" for case, said in faults.items() for line in said)


@pytest.mark.slow  # DeepSpeed compiles something the first time
def test_half_a_model_each_of_zero3(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    for one in two_processes(tmp_path, ["llava/zero3", "qwen2_5_vl/zero3"], 600):
        assert not {case: said for case, said in one.items() if said}


def test_newlines_that_deepspeed_holds_in_parts() -> None:
    family = next(family for family in families() if family.name == "llava_next")
    model = family.model()
    model.model.image_newline.data = torch.empty(0)
    ocvtp.apply(model, "attention", keep=family.keep)
    with pytest.raises(ValueError, match=r"ZeRO-3.*use ZeRO-2 or FSDP2"):
        model(**family.batch())


# ----------------------------------------------------------------------------------------------- accelerate

# Family, what comes together, and whether the patch comes after that or before.
TOGETHER = [
    ("llava", "layers", "after"),
    ("llava", "tower", "before"),
    ("llava", "model", "after"),
    ("llava", "model", "before"),
    ("internvl", "tower", "after"),
    ("qwen2_5_vl", "layers", "before"),
]


def loaded_with(model: Any, whole: str) -> list[str]:
    """Classes whose weights come together, when one of them is called."""
    if whole == "layers":
        return sorted(model._no_split_modules)
    return [type({"tower": adapter_for(model).tower, "model": model}[whole]).__name__]


def offloaded(model: Any, whole: str) -> Any:
    accelerate = pytest.importorskip("accelerate")
    here = torch.device("cpu")
    accelerate.cpu_offload(model, execution_device=here, preload_module_classes=loaded_with(model, whole))
    return model


def answers(model: Any, family: Family) -> list[torch.Tensor]:
    batch = family.batch()
    return [model.generate(**batch, do_sample=False, max_new_tokens=2), model(**batch).logits]


@pytest.mark.parametrize(("name", "whole", "patched"), [one for one in TOGETHER if one[0] in NAMES])
@torch.no_grad()
def test_weights_that_come_for_a_whole_module(name: str, whole: str, patched: str) -> None:
    family = next(family for family in families() if family.name == name)
    options = [{}, *(option for option in family.options if "tower" in option)]
    one, other = family.model(), family.model()
    if patched == "after":
        offloaded(other, whole)
    for option in options:
        for model in (one, other):
            ocvtp.apply(model, family.pruner(), keep=family.keep, **option)
        if patched == "before" and not option:
            offloaded(other, whole)
        for got, want in zip(answers(other, family), answers(one, family), strict=True):
            assert torch.equal(got, want)
        assert all(parameter.is_meta for parameter in other.parameters())


@pytest.mark.parametrize("whole", [True, False])
@torch.no_grad()
def test_a_pruner_whose_weights_come(whole: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, kept_elsewhere, inputs = llava(), pruner(), prompt(ONE, pixels(1))
    ocvtp.apply(model, pruner(), keep=KEEP)
    want = model(**inputs).logits
    classes = [type(kept_elsewhere).__name__] if whole else None
    accelerate.cpu_offload(
        kept_elsewhere, execution_device=torch.device("cpu"), preload_module_classes=classes
    )
    ocvtp.apply(model, kept_elsewhere, keep=KEEP)
    assert torch.equal(model(**inputs).logits, want)
    assert all(parameter.is_meta for parameter in kept_elsewhere.parameters())


# ------------------------------------------------------------------------------------------- in the way of it


@torch.no_grad()
def test_other_hooks_of_a_layer_see_its_calls_and_no_others() -> None:
    """What goes into a layer besides its own call is not shown to hooks that don't look after weights."""
    model, calls = offloaded(llava(), "layers"), []
    layers = root(model.model.vision_tower).encoder.layers
    for layer in layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    ocvtp.apply(model, pruner(), keep=KEEP)
    model(**prompt(ONE, pixels(1)))
    assert len(calls) == len(layers) - 1  # the last is not consumed


# --------------------------------------------------------------------------------------------- DataParallel


def test_replicas_of_a_patched_model_are_refused() -> None:
    """Their methods would be the first model's, with its weights."""
    model = llava()
    plain = dict(model.__dict__)
    ocvtp.apply(model, pruner(), keep=KEEP)
    with pytest.raises(PatchError, match=r"DataParallel.*CUDA_VISIBLE_DEVICES"):
        model._replicate_for_data_parallel()
    ocvtp.remove(model)
    assert dict(model.__dict__) == plain
    assert model._replicate_for_data_parallel()._is_replica
