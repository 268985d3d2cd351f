"""Tiles by number of rows count only where their bits were seen to be the same, and looking finds others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import same_bits
from bench.micro.slot_inputs import Widths
from ocvtp_kernels import _tiles
from ocvtp_kernels._launch import Launch, recording
from ocvtp_kernels.slot_attention import loop

pytest.importorskip("triton")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="bits are the interpreter's")

LINEAR = ("slot_attention.linear", "sm90", "mlp-2-16bit")
WIDTHS = Widths(48, 40, 32, 48)
SIZES = ((2, 20, 5),)


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Proofs that the launchers ask; none to begin with."""
    proofs: list[dict[str, Any]] = []
    monkeypatch.setattr(_tiles, "proofs", lambda: proofs)
    monkeypatch.setattr(_tiles, "_triton", lambda: "3.9")
    return proofs


def a_proof(*tiles: _tiles.Tile, triton: str = "3.9") -> dict[str, Any]:
    kernel, arch, shape = LINEAR
    return {
        "kernel": kernel,
        "arch": arch,
        "shape": shape,
        "triton": [triton],
        "tiles": list(tiles),
        "seen": {},
    }


def test_without_a_proof_one_tile_serves_all(proven: list[dict[str, Any]]) -> None:
    own = _tiles.tile(*LINEAR)
    assert {tuple(_tiles.tile_of_rows(*LINEAR, rows).items()) for rows in (1, 1023, 1024, 4096, 10**6)} == {
        tuple(own.items())
    }
    with _tiles.trusting_bits():
        assert _tiles.tile_of_rows(*LINEAR, 1)["BO"] < own["BO"] < _tiles.tile_of_rows(*LINEAR, 4096)["BO"]
        assert _tiles.tile_of_rows(*LINEAR, 1024) == _tiles.tile_of_rows(*LINEAR, 4095) == own


def test_a_proof_is_of_these_tiles_and_this_triton(proven: list[dict[str, Any]]) -> None:
    own, few = _tiles.tile(*LINEAR), _tiles.tile(*LINEAR[:2], "mlp-2-16bit, few rows")
    proven.append(a_proof(own, few))
    assert _tiles.tile_of_rows(*LINEAR, 64) == few
    assert _tiles.tile_of_rows(*LINEAR, 4096) == own  # many rows are not proven
    for other in (
        a_proof(own, few, triton="3.6"),
        a_proof({**own, "BC": 32}, few),
        a_proof(own, {**few, "BM": 32}),
    ):
        proven[:] = [other]
        assert _tiles.tile_of_rows(*LINEAR, 64) == own


def test_proofs_that_are_shipped_are_of_the_table() -> None:
    for one in _tiles.proofs():
        own = _tiles.tile(one["kernel"], one["arch"], one["shape"])
        kinds = [f"{one['shape']}, {kind} rows" for kind in ("few", "many")]
        others = [_tiles.table().get((one["kernel"], one["arch"], kind)) for kind in kinds]
        assert own in one["tiles"]
        assert all(tile in [own, *others] for tile in one["tiles"])
        assert one["seen"].keys() == {"device", "torch", "commit"}


def test_every_class_with_several_tiles_is_looked_at() -> None:
    for arch in ("sm80", "sm86", "sm90", "sm100"):
        seen = {(kernel, shape): len(tiles) for kernel, shape, tiles in same_bits.classes(arch)}
        rows = [key for key in _tiles.table() if key[1] == arch and key[2].endswith(" rows")]
        assert sum(seen.values()) - len(seen) == len(rows) > 0
    assert not list(same_bits.classes("gfx942"))  # its matrix instruction depends on the tile


def test_the_loops_own_tile_is_that_of_the_launches() -> None:
    """So both run the same products, block for block."""
    for _, arch, shape in [key for key in _tiles.table() if key[0] == "slot_attention.slot_loop"]:
        if shape.endswith(" rows"):
            continue
        tile = _tiles.tile("slot_attention.slot_loop", arch, shape)
        attend = _tiles.tile("slot_attention.attend", arch, "K<=64-16bit")
        update = _tiles.tile("slot_attention.update", arch, "K<=64-16bit")
        gru = _tiles.tile("slot_attention.gru", arch, "any-16bit")
        layers = [
            _tiles.tile("slot_attention.linear", arch, f"{role}-16bit")
            for role in ("mlp-1", "mlp-2", "queries")
        ]
        assert (tile["BM"], tile["BK"]) == (attend["BM"], attend["BK"])
        assert (tile["BK"], tile["BN"], tile["BD"]) == (update["BK"], update["BN"], update["BD"])
        assert (tile["BR"], tile["BJ"]) == (gru["BM"], gru["BJ"])
        assert [tile[name] for name in ("BO1", "BO2", "BOQ")] == [layer["BO"] for layer in layers]
        assert {layer["BM"] for layer in layers} == {tile["BR"]}
        assert {row["num_warps"] for row in (attend, update, gru, *layers)} == {tile["num_warps"]}


@interpreted
def test_tiles_are_told_apart_by_any_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that adds in another order, one that only runs otherwise, and one that can't run at all."""
    own = {**_tiles.tile(*LINEAR), "BC": 16}
    others = [{**own, "num_stages": 1}, {**own, "BC": 64}, {**own, "BC": 24}]
    with same_bits.replaced(*LINEAR, own):
        made = same_bits.calls(torch.device("cpu"), WIDTHS, SIZES)
        kernel, arch, shape = LINEAR
        found = same_bits.compare(kernel, arch, shape, [own, *others], made)
    assert found.tiles == [own, others[0]]
    assert len(found.different) == 2
    # The first that differs is what the kernel writes, and then all that comes of it.
    assert "'BC': 64" in found.different[0]
    assert "linear.y" in found.different[0]
    assert "can't run" in found.different[1]


@interpreted
def test_the_loop_is_compared_with_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    made = same_bits.calls(torch.device("cpu"), WIDTHS, SIZES)
    own = _tiles.tile("slot_attention.slot_loop", "sm90", "K<=64-16bit")
    assert same_bits.loop_differs("sm90", own, made) == []
    assert "largest" in same_bits.loop_differs("sm90", {**own, "BC": 16}, made)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    own, few = _tiles.tile(*LINEAR), {**_tiles.tile(*LINEAR), "BO": 16}
    found = same_bits.Found(LINEAR[0], LINEAR[2], [own, few], [])
    new = same_bits.proof(found, "sm90", {"device": "a GPU", "torch": "2", "commit": "abc"})
    older = {**new, "triton": ["3.1"]}
    same = {**new, "tiles": []}
    proofs = same_bits.renewed([older, same], [new])
    assert proofs == [older, new]
    same_bits.write(proofs, tmp_path / "proofs.json")
    assert json.loads((tmp_path / "proofs.json").read_text()) == proofs
    same_bits.write([], tmp_path / "proofs.json")
    assert (tmp_path / "proofs.json").read_text() == "[]\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to look at")
def test_without_a_gpu_bits_cant_be_seen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        same_bits.main([])
    assert "seen on a GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_proofs_hold_on_this_gpu() -> None:
    """And the loop in one launch computes what the launches do, with its own tile, proven or not."""
    from ocvtp_kernels._arch import architecture

    device = torch.device("cuda", torch.cuda.current_device())
    arch = architecture(device)
    assert arch is not None
    made = same_bits.calls(device, Widths(), [(1, 576, 64), (3, 131, 50)])
    own = _tiles.tile("slot_attention.slot_loop", arch, "K<=64-16bit")
    assert same_bits.loop_differs(arch, own, made) == []
    for one in _tiles.proofs():
        if one["arch"] == arch and one["kernel"] != "slot_attention.slot_loop":
            found = same_bits.compare(one["kernel"], arch, one["shape"], one["tiles"], made)
            assert not found.different


def launched(call: same_bits.Call) -> list[Launch]:
    with recording() as launches:
        call()
    return launches


def test_few_images_take_the_loop() -> None:
    made = same_bits.calls(torch.device("cpu"), WIDTHS, [(1, 20, 5), (5, 20, 5), (1, 20, 65)])
    names = [[launch.kernel.fn.__name__ for launch in launched(call)] for call in made]
    if torch.cuda.is_available():
        pytest.skip("counted where the interpreter runs")
    assert names[0] == ["normalise", "linear", "linear", "normalise", "slot_loop"]
    assert len(names[1]) == len(names[2]) == 17
    with loop.up_to(0):
        assert len(launched(made[0])) == 17
