"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from safetensors import safe_open

if not torch.cuda.is_available():  # kernels then run in Triton's interpreter; read when they are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: more threads only get in each other's way
    torch.set_num_threads(1)

from ocvtp import OCPruner, PrunerConfig
from tests.far import FarLine
from tests.fickle import Fickle
from tests.rehearsal import Rehearsal

with contextlib.suppress(ImportError):  # no Triton
    from tests.interpreted import prepare_once_a_launch

    prepare_once_a_launch()

DATA = Path(__file__).parent / "data"
SHARED_GOLDEN = Path(__file__).parents[2] / "shared" / "golden"

# Timings vary on shared machines; examples are derandomised so that CI and a laptop test the same ones.
settings.register_profile("ocvtp", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ocvtp")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("what PyTorch multiplies with")
    group.addoption("--threads", type=int, help="of PyTorch; default: one with -n, else as many as it takes")
    group.addoption("--without-onednn", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    if (threads := config.getoption("--threads")) is not None:
        torch.set_num_threads(threads)
    if config.getoption("--without-onednn"):
        torch.backends.mkldnn.set_flags(False)


class Golden(NamedTuple):
    """Tensors of the official implementation, and the configuration that made them."""

    tensors: dict[str, torch.Tensor]
    config: dict

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The official state dict."""
        return {k[len("param.") :]: v for k, v in self.tensors.items() if k.startswith("param.")}

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradient of the mean loss for every parameter, by official name."""
        return {k[len("grad.") :]: v for k, v in self.tensors.items() if k.startswith("grad.")}


def read_golden(path: Path) -> Golden:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        config = json.loads((file.metadata() or {}).get("config", "{}"))
    return Golden(tensors, config)


@pytest.fixture(scope="session", params=["tiny", "small"])
def golden(request: pytest.FixtureRequest) -> Golden:
    folder = DATA if request.param == "tiny" else SHARED_GOLDEN
    path = folder / f"{request.param}.safetensors"
    if not path.exists():
        pytest.skip(f"{path.name} is 3 MB and not part of the repository")
    return read_golden(path)


@pytest.fixture(scope="session")
def golden_selection() -> dict[str, torch.Tensor]:
    return read_golden(DATA / "select_small.safetensors").tensors


SMALL = PrunerConfig(in_dim=48, hidden_dim=96, slot_dim=32, ffn_dim=64, layer=1)


def make_pruner(config: PrunerConfig = SMALL, seed: int = 0) -> OCPruner:
    """A random pruner whose norms, biases and slot spread are not at their neutral start values."""
    generator = torch.Generator().manual_seed(seed)
    pruner = OCPruner(config)
    with torch.no_grad():
        for name, parameter in pruner.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                is_gain = "norm" in name and name.endswith("weight")
                parameter.copy_(is_gain + 0.2 * draw)
            elif parameter.ndim == 2:
                parameter.copy_(1.5 * draw * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(0.1 * draw)
    return pruner.eval()


@pytest.fixture
def pruner() -> OCPruner:
    return make_pruner()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@pytest.fixture(params=["this library", "a fickle one"])
def library(request: pytest.FixtureRequest) -> Iterator[None]:
    """What multiplies and adds, for tests that want the same bits of any."""
    with Fickle() if request.param == "a fickle one" else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def gradients_as_they_were() -> Iterator[None]:
    """A test that leaves gradients switched off would break those that follow in its process."""
    yield
    assert torch.is_grad_enabled()


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> list[Rehearsal]:
    """Lanes made during the test, all of them rehearsals."""
    made: list[Rehearsal] = []

    def lane_for(device: torch.device) -> Rehearsal:
        made.append(Rehearsal(device))
        return made[-1]

    monkeypatch.setattr("ocvtp.pruner.capture.lane_for", lane_for)
    return made


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> FarLine:
    """The CPU's values are far away, as a GPU's are: nobody looks before they have arrived."""
    line = FarLine()
    monkeypatch.setattr("ocvtp.watch._line", line)
    monkeypatch.setattr("ocvtp.watch._of_functions", threading.local())  # not what this test leaves
    return line


@pytest.fixture
def fresh_inputs() -> Iterator[None]:
    """Microbenchmarks draw a case's inputs once a process; a test that changes cases draws its own."""
    from bench.micro.measure import prepared

    prepared.cache_clear()
    yield
    prepared.cache_clear()
