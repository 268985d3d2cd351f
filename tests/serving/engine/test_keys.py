"""Caches are never shared by engines that would keep other tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import ocvtp
import ocvtp.serving
from tests.serving.engine import folders
from tests.serving.engine.asking import answers, ask, engine, pictures, reference, requests
from tests.serving.engine.folders import Hub
from tests.serving.engine.pruners import Pruners

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")


def key_of(folder: Path, settings: dict[str, Any] | None, uuid: str | None) -> str:
    """What vLLM's caches know an image by."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    pruned = {} if settings is None else ocvtp.serving.engine_args(str(folder), **settings)
    config = EngineArgs(model=str(folder), max_model_len=512, **pruned).create_engine_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
    items = processor.info.parse_mm_data({"image": pictures(1)})
    made = processor("<image> w", items, mm_uuid_items={"image": [uuid]} if uuid else None)
    key: str = made["mm_hashes"]["image"][0]
    return key


def one_weight_changed(source: Path, target: Path) -> Path:
    """A pruner that differs from ``source`` in one number."""
    pruner = ocvtp.OCPruner.from_pretrained(source)
    weight = next(parameter for parameter in pruner.parameters() if parameter.ndim >= 2)
    weight.data[0, 0] += 1e-3
    pruner.save_pretrained(target)
    return target


@pytest.mark.quick
@pytest.mark.parametrize("uuid", [None, "my-picture"])
def test_settings_have_keys_of_their_own(
    hub: Hub, pruner_for: Pruners, tmp_path: Path, uuid: str | None
) -> None:
    """Also where a client names its pictures, which vLLM then takes for their contents."""
    folder = hub(folders.NEXT)
    own = pruner_for(folder)
    by_pruner = {"keep": 3, "pruner": str(own)}
    settings: list[dict[str, Any] | None] = [
        None,
        {"keep": 3},
        {"keep": 2},
        {"keep": 0.25},
        {"keep": 3, "pruner": "attention"},
        {"keep": 3, "pruner": "random"},
        {"keep": 3, "pruner": "random", "seed": 1},
        {"keep": 3, "merge": "off"},
        {"keep": 3, "features": "early"},
        {"keep": 3, "refine": 1},
        {"keep": 3, "newlines": "all"},
        {"keep": 3, "backend": "torch"},
        by_pruner,
        {**by_pruner, "seed": 1},
        {**by_pruner, "fill": "farthest_point"},
        {**by_pruner, "precision": "fp32"},
        {**by_pruner, "pruner": str(one_weight_changed(own, tmp_path / "other"))},
    ]
    keys = [key_of(folder, one, uuid) for one in settings]
    assert len(set(keys)) == len(keys)
    copied = shutil.copytree(own, tmp_path / "copied")
    assert key_of(folder, {**by_pruner, "pruner": str(copied)}, uuid) == key_of(folder, by_pruner, uuid)


def same_from_a_store(folder: Path, store: Path, *pruners: Path) -> list[int]:
    """Right answers of engines that share a store of encoder outputs on disk, one after another."""
    asked = requests(folder)
    connector = {
        "ec_connector": "ECExampleConnector",
        "ec_role": "ec_both",
        "ec_connector_extra_config": {"shared_storage_path": str(store)},
    }
    right = []
    for pruner in pruners:
        settings = {"keep": 6, "pruner": str(pruner)}
        with engine(folder, settings, ec_transfer_config=connector) as llm:
            got = answers(ask(llm, asked))
        right.append(sum(a == b for a, b in zip(got, reference(folder, settings, asked), strict=True)))
    assert any(store.iterdir())
    return right


@pytest.mark.quick
def test_a_store_that_two_engines_share(hub: Hub, pruner_for: Pruners, tmp_path: Path) -> None:
    folder = hub(folders.LLAVA)
    one, other = pruner_for(folder), pruner_for(folder, 6)
    assert same_from_a_store(folder, tmp_path / "store", one, other, one) == [11, 11, 11]


@pytest.mark.quick
def test_without_our_part_of_the_keys_it_answers_wrongly(
    hub: Hub, pruner_for: Pruners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above would notice."""
    from ocvtp.serving.vllm.front import PrunedProcessor

    monkeypatch.delattr(PrunedProcessor, "_get_mm_hashes")
    folder = hub(folders.LLAVA)
    first, second = same_from_a_store(folder, tmp_path / "store", pruner_for(folder), pruner_for(folder, 6))
    assert first == 11
    assert second < 11
