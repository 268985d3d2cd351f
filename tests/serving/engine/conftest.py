"""Folders and engines for tests that need vLLM. ``make test-serving`` runs them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.engine import folders, pruners

if importlib.util.find_spec("vllm") is not None:
    from tests.serving.engine import process

    process.prepare()  # before vLLM is imported


@pytest.fixture(scope="session", autouse=True)
def looked_at_here() -> Iterator[None]:
    """vLLM starts a process of eight seconds to look at a model's class, lest CUDA begin in this one."""
    try:
        from vllm.model_executor.models import registry
    except ImportError:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda look: look())
        yield


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> folders.Hub:
    """The folder of a model, written when it is first asked for."""
    root, made = tmp_path_factory.mktemp("hub"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = folders.write(root, name)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def pruner_for(tmp_path_factory: pytest.TempPathFactory) -> pruners.Pruners:
    """The folder of a pruner that fits a model; another seed is another pruner."""
    root, made = tmp_path_factory.mktemp("pruners"), dict[tuple[Path, int], Path]()

    def folder(model: Path, seed: int = 5) -> Path:
        if (model, seed) not in made:
            made[model, seed] = pruners.write(root / f"{len(made)}", model, seed)
        return made[model, seed]

    return folder
