"""Odd ``config.json``, ``model.safetensors``, ``.pth``: loaded right, or refused by file and name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ocvtp import CheckpointError, OCPruner, PrunerConfig
from tests.alterations import harmless, of_bytes, of_json, of_values
from tests.conftest import SMALL, Golden, make_pruner

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KEY = "aggregat.proj_k.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_pruner().save_pretrained(folder)
    return folder


def content(pruner: OCPruner) -> object:
    return pruner.config, {key: value.numpy().tobytes() for key, value in pruner.state_dict().items()}


def outcome(folder: Path) -> object:
    """What is loaded, or what is said."""
    try:
        return content(OCPruner.from_pretrained(folder))
    except CheckpointError as error:
        return str(error)[:900]  # what to do comes last


def test_every_field_of_a_config(saved: Path, tmp_path: Path) -> None:
    want, wrong = outcome(saved), []
    folder = shutil.copytree(saved, tmp_path / "pruner")
    for what, values, field in of_values(json.loads((saved / CONFIG).read_text())):
        (folder / CONFIG).write_text(json.dumps(values))
        said = outcome(folder)
        told = isinstance(said, str) and all(part in said for part in (CONFIG, field, "again"))
        if said != want and not told:
            wrong.append(f"{what}: {said}")
    assert not wrong


def test_texts_of_a_config(saved: Path, tmp_path: Path) -> None:
    want = outcome(saved)
    folder = shutil.copytree(saved, tmp_path / "pruner")
    refused = 0
    for alteration in (*of_json(), *harmless()):
        (folder / CONFIG).write_bytes(alteration.apply((saved / CONFIG).read_bytes()))
        said = outcome(folder)
        assert said == want or (isinstance(said, str) and CONFIG in said and "again" in said), alteration.name
        refused += said != want
    assert refused > 30


def test_bytes_of_the_weights(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "pruner")
    for alteration in of_bytes():
        (folder / WEIGHTS).write_bytes(alteration.apply((saved / WEIGHTS).read_bytes()))
        said = outcome(folder)
        assert isinstance(said, str), alteration.name
        assert WEIGHTS in said
        assert "again" in said


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_stands_in_a_files_place(saved: Path, tmp_path: Path, name: str, kind: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "pruner")
    (folder / name).unlink()
    if kind == "folder":
        (folder / name).mkdir()
    elif hasattr(os, "mkfifo"):
        os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=name):
        OCPruner.from_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    ["in_dim", "slot_dim", "ffn_dim", "decoder_layers", "num_iters", "decoder_tokens", "layer", "unit"],
)
def test_absurd_sizes_are_refused_before_anything_is_built(name: str) -> None:
    for value in (10**6, 10**9, 10**400, 10**5000, -1, 1e3, "8", [8], True, None):
        with pytest.raises(
            ValueError, match=rf"PrunerConfig\.{name} must be an int of at least . and at most"
        ):
            PrunerConfig(**{name: value})  # type: ignore[arg-type]


def test_weights_changed_by_another_program(saved: Path, tmp_path: Path) -> None:
    """A tool that keeps the header is noticed; one that writes a file of its own is trusted with it."""
    folder = shutil.copytree(saved, tmp_path / "pruner")
    tensors = load_file(folder / WEIGHTS)
    tensors["slot_mean"] += 1
    with safe_open(saved / WEIGHTS, "pt") as file:
        header = file.metadata()
    save_file(tensors, folder / WEIGHTS, metadata=header)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: slot_mean is not what was written"):
        OCPruner.from_pretrained(folder)
    save_file(tensors, folder / WEIGHTS)
    assert torch.equal(OCPruner.from_pretrained(folder).slot_mean, tensors["slot_mean"])


def test_equal_pruners_are_equal_files(saved: Path, tmp_path: Path) -> None:
    OCPruner.from_pretrained(saved).save_pretrained(tmp_path)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


Tensor = torch.Tensor
ODD: dict[str, Callable[[Tensor], object]] = {
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "bool": lambda t: t > 0,
    "int8": lambda t: t.to(torch.int8),
    "uint16": lambda t: t.to(torch.int32).to(torch.uint16),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "quantised by row": lambda t: torch.quantize_per_channel(
        t, torch.ones(len(t)), torch.zeros(len(t)), 0, torch.qint8
    ),
    "expanded": lambda t: t.flatten()[:1].clone().expand(t.shape),
    "a large claim": lambda t: torch.zeros(1).expand(30000, 30000),
    "an absurd claim": lambda t: torch.zeros(1).expand(10**9, 10**9),
    "empty": lambda t: t[:0],
    "a scalar": lambda t: t.sum(),
    "five dimensions": lambda t: t[None, None, None],
    "no values": lambda t: torch.empty(0),
    "another dtype": lambda t: t.double(),
    "infinite": lambda t: t * torch.inf,
    "a list": lambda t: t.tolist(),
    "a dict": lambda t: {"weight": t},
    "a number": lambda t: 3.0,
    "None": lambda t: None,
    "a string": lambda t: "weights",
    "a dtype": lambda t: t.dtype,
    "a size": lambda t: t.shape,
    "a device": lambda t: t.device,
}
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "a parameter": lambda t: torch.nn.Parameter(t),
    "needs no gradient": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "transposed": lambda t: t.t().contiguous().t(),
    "a view": lambda t: torch.cat([t, t])[: len(t)],
    "with steps": lambda t: torch.stack([t, t], dim=-1)[..., 1],
    "negated twice": lambda t: torch._neg_view(-t),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_odd_tensors(tmp_path: Path, golden: Golden, name: str) -> None:
    for key in (KEY, "encode_project.mlp.1.weight"):
        torch.save({**golden.state, key: ODD[name](golden.state[key])}, tmp_path / "weights.pth")
        with pytest.raises(CheckpointError, match=r"weights\.pth") as caught:
            OCPruner.from_official(tmp_path / "weights.pth")
        said = str(caught.value)
        assert key in said or "tensors alone" in said or "one dtype" in said or "sizes" in said
        assert len(said) < 900


@pytest.mark.parametrize("name", SAME)
def test_the_same_weights_otherwise(tmp_path: Path, golden: Golden, name: str) -> None:
    torch.save({**golden.state, KEY: SAME[name](golden.state[KEY])}, tmp_path / "weights.pth")
    loaded = OCPruner.from_official(tmp_path / "weights.pth")
    assert content(loaded) == content(OCPruner.from_official(golden.state))
    parameters = list(loaded.parameters())
    assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters)


def test_tensors_that_share_their_storage(tmp_path: Path, golden: Golden) -> None:
    whole = torch.cat([value.flatten() for value in golden.state.values()])
    parts = iter(whole.split([value.numel() for value in golden.state.values()]))
    state = {key: next(parts).view(value.shape) for key, value in golden.state.items()}
    torch.save(state, tmp_path / "weights.pth")
    loaded = OCPruner.from_official(tmp_path / "weights.pth")
    assert content(loaded) == content(OCPruner.from_official(golden.state))
    with torch.no_grad():
        loaded.slot_mean.zero_()
    assert torch.equal(loaded.slot_log_std, golden.state["initializ.logstd"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: list(state.items()),
        lambda state: {"state_dict": list(state)},
        lambda state: {"state_dict": {"state_dict": state}},
        lambda state: {"model": state},
        lambda state: {1: next(iter(state.values())), **state},
        lambda state: {("a", "b"): next(iter(state.values())), **state},
        lambda state: {},
        lambda state: next(iter(state.values())),
        lambda state: 3,
        lambda state: {**state, "x" * 10**6: torch.zeros(1)},
        lambda state: {**state, **{f"more.{i}": torch.zeros(1) for i in range(3000)}},
    ],
    ids=range(11),
)
def test_odd_state_dicts(tmp_path: Path, golden: Golden, wrap: Callable[[dict], object]) -> None:
    torch.save(wrap(dict(golden.state)), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weights\.pth") as caught:
        OCPruner.from_official(tmp_path / "weights.pth")
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int64, torch.bool, torch.float8_e5m2, torch.complex64])
def test_dtypes_of_safetensors(saved: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = shutil.copytree(saved, tmp_path / "pruner")
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "slot_mean": torch.zeros(1, 1, SMALL.slot_dim, dtype=dtype)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: 'slot_mean' is torch"):
        OCPruner.from_pretrained(folder)
