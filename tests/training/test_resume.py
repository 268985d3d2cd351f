"""A run killed at any moment ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ocvtp.training.checkpoint import STATE
from ocvtp.training.log import read_metrics

ROOT = Path(__file__).parents[2]

# Children die with SIGKILL, each after some more moments than the one before: before and after every file is
# flushed and put in place, every row of metrics and every step. One process forks all of them, because
# importing torch takes longer than such a run.
KILLED_AGAIN_AND_AGAIN = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from ocvtp.training import log, trainer
from tests.training.fake import run

out, left = Path(sys.argv[1]), 0

def moment():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def before_and_after(owner, name):
    whole = getattr(owner, name)
    def wrapped(*args, **kwargs):
        moment()
        made = whole(*args, **kwargs)
        moment()
        return made
    setattr(owner, name, wrapped)

before_and_after(os, "replace")
before_and_after(os, "fsync")
before_and_after(log.MetricsLog, "write")
before_and_after(trainer._Run, "_step")
print(run(out / "undisturbed"))
deaths = 0
while True:
    child = os.fork()
    if child == 0:
        left = 5 + 5 * deaths
        run(out / "killed")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        deaths += 1
        continue
    assert os.WEXITSTATUS(status) == 0, status
    break
print("deaths", deaths)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    out = tmp_path_factory.mktemp("resume")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED_AGAIN_AND_AGAIN, str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, int(done.stdout.split()[-1])


def test_it_was_killed_often(runs: tuple[Path, int]) -> None:
    assert runs[1] >= 8


def test_state_is_the_same_to_the_bit(runs: tuple[Path, int]) -> None:
    one, other = (load_file(runs[0] / name / STATE) for name in ("undisturbed", "killed"))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_the_best_pruner_is_the_same(runs: tuple[Path, int], file: str) -> None:
    one, other = ((runs[0] / name / "pruner" / file).read_bytes() for name in ("undisturbed", "killed"))
    assert one == other


def test_metrics_have_every_row_once(runs: tuple[Path, int]) -> None:
    one, other = (read_metrics(runs[0] / name) for name in ("undisturbed", "killed"))
    for row in [*one, *other]:
        row.pop("images_per_second", None)
    assert json.dumps(one) == json.dumps(other)


def test_nothing_half_written_stays(runs: tuple[Path, int]) -> None:
    assert not [path for path in (runs[0] / "killed").rglob("*") if path.name.endswith(".partial")]


def test_tensorboard_shows_no_step_twice(runs: tuple[Path, int]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(runs[0] / "killed" / "tensorboard"))
    board.Reload()
    steps = [event.step for event in board.Scalars("train/loss")]
    assert steps == sorted(set(steps))
