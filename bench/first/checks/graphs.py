"""What a launch costs in a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from bench.first.checks.kernels import add_one, in_turn
from bench.first.checks.setting import Setting
from bench.first.run import Finding

NODES = 17
PHASES = 13
TASKS = (1, 9, 32)


def graphs(setting: Setting) -> Iterator[Finding]:
    """A chain of empty kernels, plain and as dependent launches; and phases of one launch."""
    plain = _chain(setting, dependent=False)
    yield {"what": f"{NODES} empty kernels, one after another", **plain}
    if setting.on_gpu and torch.cuda.get_device_capability(setting.device) >= (9, 0):
        dependent = _chain(setting, dependent=True)
        saved = plain["us a node"] - dependent["us a node"]
        yield {"what": f"{NODES} as programmatic dependent launches", **dependent, "saved a node": saved}
    else:
        yield {"what": "programmatic dependent launches", "this device has them": False}
    for tasks in TASKS:
        yield _phases(setting, tasks)


def _chain(setting: Setting, dependent: bool) -> dict[str, float | bool]:
    counter = torch.zeros(1, dtype=torch.int32, device=setting.device)
    options = {"launch_pdl": True} if dependent else {}

    def chain() -> torch.Tensor:
        for _ in range(NODES):
            add_one[(1,)](counter, DEPENDENT=dependent, num_warps=4, **options)
        return counter

    before = int(counter)
    chain()
    right = int(counter) - before == NODES
    us = setting.graph_us([chain])
    right = right and int(counter) % NODES == 0
    return {"us a node": us / NODES, "us": us, "right": right}


def _phases(setting: Setting, tasks: int) -> Finding:
    words = torch.zeros(PHASES + 2, dtype=torch.int32, device=setting.device)
    sums = torch.zeros(PHASES + 1, dtype=torch.int32, device=setting.device)

    def launch() -> torch.Tensor:
        in_turn[(PHASES * tasks,)](words, sums, PHASES=PHASES, TASKS=tasks, num_warps=4)
        return sums

    launch()
    right = _counted(words, sums)
    empty = _alone(setting)
    us = setting.graph_us([launch])
    return {
        "what": f"{PHASES} phases of {tasks} tasks in one launch",
        "us a phase": (us - empty) / PHASES,
        "us": us,
        "an empty kernel": empty,
        "right": right and _counted(words, sums),
    }


def _counted(words: torch.Tensor, sums: torch.Tensor) -> bool:
    return not words.any() and sums.tolist() == list(range(PHASES + 1))


def _alone(setting: Setting) -> float:
    counter = torch.zeros(1, dtype=torch.int32, device=setting.device)
    call: Callable[[], object] = lambda: add_one[(1,)](counter, DEPENDENT=False, num_warps=4)  # noqa: E731
    return setting.graph_us([call])
