"""Runs of lmms-eval in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from ocvtp.harness.model import Ocvtp


@dataclass(frozen=True)
class Run:
    """What lmms-eval would write.

    Attributes:
        found: its results.
    """

    found: dict[str, Any]

    def samples(self, task: str) -> list[dict[str, Any]]:
        """In the order of the rows."""
        return sorted(self.found["samples"][task], key=lambda sample: sample["doc_id"])

    def answers(self, task: str) -> list[str]:
        """As they were given."""
        return [sample["resps"][0][0] for sample in self.samples(task)]

    def counts(self, task: str) -> list[dict[str, Any]]:
        """Of tokens and images."""
        return [sample["token_counts"][0] for sample in self.samples(task)]

    @property
    def record(self) -> dict[str, Any]:
        """Ours."""
        (record,) = self.found["config"]["batch_sizes"]
        return record


def ocvtp_model(arguments: str, batch_size: int = 1) -> Ocvtp:
    """As ``--model ocvtp --model_args`` makes it."""
    given = {"batch_size": batch_size, "device": "cpu"}
    return Ocvtp.create_from_arg_string(f"{arguments},dtype=float32", given)


def ask(manager: TaskManager, model: Any, tasks: Sequence[str], **options: Any) -> Run:
    """Every question of some tasks; ``model`` can be asked once, since lmms-eval frees it.

    Args:
        manager: knows the tasks.
        model: an instance.
        tasks: names.
        options: of ``simple_evaluate``.
    """
    manager.task_group_map.clear()  # or the second run's tasks are called pope-1
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        bootstrap_iters=0,
        process_docs_parallel=1,
        **options,
    )
    assert found is not None
    return Run(found)
