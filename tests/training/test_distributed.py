"""Two processes on the CPU do what one does, and stop together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

from ocvtp.training.checkpoint import STATE, read_progress
from ocvtp.training.log import read_metrics
from tests.training.fake import Fake, run, small_config

ROOT = Path(__file__).parents[2]

# For CPUs, `accelerate launch` itself asks for MPI; with GPUs it runs this.
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

# What each process runs. Dropout is drawn on the device: processes can't draw what one would.
EACH = """
import dataclasses, math, sys
from pathlib import Path
import torch
from ocvtp.training import trainer
from ocvtp.training.step import Objective
from ocvtp.training.team import Team, TrainingError
from tests.training.fake import RECIPE, Fake, run, small_config

out, team = Path(sys.argv[1]), Team(torch.device("cpu"))
config = small_config(Fake(), dropout=0.0)
run(out / "run", config=config, workers=team.rank)

def fails(name, **options):
    try:
        run(out / name, **{"config": config, "log_every": 2, **options})
    except (ValueError, TrainingError, OSError) as error:
        (out / f"{name}-{team.rank}.txt").write_text(f"{type(error).__name__}: {error}")

class Broken(Fake):
    def batch(self, indices):
        if team.rank == 1 and len(indices) == 2 and 7 in indices:
            raise OSError("record 7 is gone")
        return super().batch(indices)

whole = Objective.forward
def overflowing(self, *arguments):
    made = whole(self, *arguments)
    Objective.steps += self.training
    return made._replace(loss=made.loss * (math.inf if team.rank == 1 and Objective.steps == 5 else 1))
Objective.forward, Objective.steps = overflowing, 0
fails("diverged")
Objective.forward = whole
fails("broken", source=Broken())
fails("odd", recipe=dataclasses.replace(RECIPE, batch_size=5))
def full(self):
    raise OSError("no space left")
trainer._Run._write_pruner = full
fails("full")
"""


class Folders(NamedTuple):
    two: Path
    one: Path

    def said(self, name: str) -> list[str]:
        """Of both processes."""
        return [(self.two / f"{name}-{rank}.txt").read_text() for rank in range(2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    out = tmp_path_factory.mktemp("distributed")
    (out / "each.py").write_text(EACH)
    (out / "two").mkdir()
    launch = (*LAUNCH, out / "each.py", out / "two")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *launch],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,  # processes that wait for each other
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run(out / "one" / "run", config=small_config(Fake(), dropout=0.0))
    return Folders(out / "two", out / "one")


def test_same_metrics(folders: Folders) -> None:
    two, one = (read_metrics(folder / "run") for folder in folders)
    assert len(two) == len(one) == 27
    for ours, theirs in zip(two, one, strict=True):
        for row in (ours, theirs):
            row.pop("images_per_second", None)
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_same_parameters_and_moments(folders: Folders) -> None:
    two, one = (load_file(folder / "run" / STATE) for folder in folders)
    assert two.keys() == one.keys()
    for name, value in one.items():
        assert two[name].allclose(value, atol=1e-4), name


def test_all_stop_when_the_loss_diverges(folders: Folders) -> None:
    one, other = folders.said("diverged")
    assert one == other
    assert one.startswith(
        "DivergedError: the loss is NaN or infinite in step 5. Kept are the state after step 3"
    )
    state = load_file(folders.two / "diverged" / STATE)
    assert all(value.isfinite().all() for value in state.values())


def test_all_stop_when_one_can_not_read_its_features(folders: Folders) -> None:
    one, other = folders.said("broken")
    assert "another process could not read its features" in one
    assert "OSError: record 7 is gone" in other
    saved = read_progress(folders.two / "broken")
    assert saved is not None
    assert saved.step < 8  # what came of the failed batch was not saved


def test_all_stop_when_the_disk_is_full(folders: Folders) -> None:
    one, other = folders.said("full")
    assert one == "OSError: no space left"
    assert "another process failed" in other


def test_batches_that_can_not_be_split(folders: Folders) -> None:
    assert all("can't be split evenly over 2 processes" in said for said in folders.said("odd"))
