"""Two processes on the CPU, as ``accelerate launch`` starts them, do what one does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from ocvtp.training.checkpoint import STATE
from ocvtp.training.log import read_metrics
from ocvtp.training.trainer import DivergedError
from tests.training.fake import RECIPE, Fake, run, small_config


def _train(out: Path) -> None:
    """What each process runs: two runs, one of which diverges, and settings that can't be split."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)  # forked: other tests' runs in this process were alone
    # Dropout is drawn on the device: processes can't draw what one would.
    run(out / "run", config=small_config(Fake(), dropout=0.0))
    source = Fake()
    source.x[:2] = torch.inf  # two records of one photograph: of some batches one process's part
    with pytest.raises(DivergedError):
        run(out / "diverged", source, dataclasses.replace(RECIPE, unit_variance=False))
    with pytest.raises(ValueError, match="can't be split over 2 processes"):
        run(out / "odd", recipe=dataclasses.replace(RECIPE, batch_size=5))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from accelerate import debug_launcher

    out = tmp_path_factory.mktemp("distributed")
    debug_launcher(_train, (out / "two",), num_processes=2)
    run(out / "one" / "run", config=small_config(Fake(), dropout=0.0))
    return out / "two", out / "one"


def test_same_metrics(folders: tuple[Path, Path]) -> None:
    two, one = (read_metrics(folder / "run") for folder in folders)
    assert len(two) == len(one) > 9
    for ours, theirs in zip(two, one, strict=True):
        for row in (ours, theirs):
            row.pop("images_per_second", None)
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_same_parameters(folders: tuple[Path, Path]) -> None:
    two, one = (load_file(folder / "run" / "pruner" / "model.safetensors") for folder in folders)
    for name, parameter in one.items():
        assert torch.allclose(two[name], parameter, atol=1e-4), name


def test_all_processes_stop_when_one_sees_nan(folders: tuple[Path, Path]) -> None:
    state = folders[0] / "diverged" / STATE
    assert not state.exists() or all(value.isfinite().all() for value in load_file(state).values())
