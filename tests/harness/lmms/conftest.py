"""Rows, tasks and runs for tests that need lmms-eval. ``make test-eval`` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.threads import single_threaded

#: Of a model or its ``--model_args``, tasks, a batch size and options of lmms-eval; the fixture ``run``.
Runs = Callable[..., Any]
#: Of lmms-eval's tasks, those with the paper's.
FOLDERS = (
    *("gqa", "mmbench", "mme", "mmmu", "pope", "scienceqa", "seedbench", "textvqa", "vizwiz_vqa", "vqav2"),
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    with single_threaded():
        yield


@pytest.fixture
def outside() -> Iterator[list[Any]]:
    """Data sets are local; addresses that anybody tried to reach."""
    from tests.harness.lmms.local_hub import local_hub

    with local_hub() as tried:
        yield tried


@pytest.fixture(scope="session")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``--include_path`` with a task about the test bed."""
    from tests.harness.lmms.rows import write_testbed

    return write_testbed(tmp_path_factory.mktemp("lmms") / "testbed")


@pytest.fixture(scope="session")
def manager(testbed: Path) -> Any:
    """An index of the paper's tasks and the test bed's. All of lmms-eval's take it six seconds to read."""
    import lmms_eval.tasks

    from ocvtp.harness.tasks import FOLDER

    theirs = [Path(lmms_eval.tasks.__file__).parent / name for name in FOLDERS]
    return lmms_eval.tasks.TaskManager(
        "ERROR",
        include_path=[str(folder) for folder in (FOLDER, testbed, *theirs)],
        include_defaults=False,
        model_name="ocvtp",
    )


@pytest.fixture
def run(manager: Any, outside: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Asks every question of some tasks, in a folder that tasks may write to."""
    from tests.harness.lmms.asking import ask, ocvtp_model

    monkeypatch.chdir(tmp_path)

    def found(model: Any, tasks: Sequence[str], batch_size: int = 1, **options: Any) -> Any:
        if isinstance(model, str):
            model = ocvtp_model(model, batch_size)
        return ask(manager, model, tasks, **options)

    return found


@pytest.fixture
def tokens_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are numbers of tokens: what random models say is hardly text, and many bytes look alike."""
    from transformers import PreTrainedTokenizerBase

    def numbers(_: Any, sequences: Any, **__: Any) -> list[str]:
        return [" ".join(str(token) for token in row.tolist()) for row in sequences]

    monkeypatch.setattr(PreTrainedTokenizerBase, "batch_decode", numbers)
