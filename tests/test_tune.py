"""The tuner: what it tries, what it keeps, what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ocvtp_kernels
from bench import tune
from bench.aot import TARGETS
from ocvtp_kernels import _tiles
from ocvtp_kernels.received_attention import received_attention

ROW = ("received_attention.head_mean", "sm90", "any")
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="runs another architecture's tiles")


def test_the_table_is_as_the_tuner_writes_it(tmp_path: Path) -> None:
    tune.write(_tiles.table(), tmp_path / "tiles.json")
    shipped = Path(ocvtp_kernels.__file__).with_name("tiles.json")
    assert (tmp_path / "tiles.json").read_text() == shipped.read_text()


def test_every_architecture_has_the_same_rows_and_is_compiled() -> None:
    rows: dict[str, set[tuple[str, str]]] = {}
    for kernel, arch, shape in _tiles.table():
        rows.setdefault(arch, set()).add((kernel, shape))
    assert rows.keys() == {target.tiles for target in TARGETS.values()}
    assert len({frozenset(of_one) for of_one in rows.values()}) == 1


def test_every_kernel_has_candidates_that_differ_from_the_present_tile() -> None:
    for kernel in {kernel for kernel, _, _ in _tiles.table()}:
        present = next(
            tile for (name, arch, _), tile in _tiles.table().items() if (name, arch) == (kernel, "sm90")
        )
        tried = list(tune.candidates(kernel, present))
        assert tried[0] == present
        assert len(tried) > 5
        assert all(tile.keys() == present.keys() for tile in tried)
        assert len({tuple(tile.values()) for tile in tried}) == len(tried)


def test_the_fastest_wins_only_by_more_than_the_noise() -> None:
    old, new, lucky = {"BN": 1}, {"BN": 2}, {"BN": 3}
    times = [(old, [1.0, 4.0]), (new, [0.5, 4.0]), (lucky, [0.99, 3.99])]
    assert tune.choose(times) == (new, pytest.approx(2**0.5))
    assert tune.choose([times[0], times[2]]) == (old, 1.0)


@INTERPRETED
def test_a_row_is_tuned_and_the_table_is_left_as_it_was() -> None:
    q = torch.randn(1, 2, 40, 16)
    seen = []

    def timer(call: tune.Call) -> float:
        call()
        seen.append(dict(_tiles.tile(*ROW)))
        return 0.5 if seen[-1]["BN"] == 256 and seen[-1]["num_warps"] == 2 else 1.0

    before = dict(_tiles.tile(*ROW))
    tile, gain = tune.tune_row(*ROW, [lambda: received_attention(q, q, backend="triton")], timer)
    assert (tile["BN"], tile["num_warps"], gain) == (256, 2, pytest.approx(2.0))
    assert len({tuple(one.items()) for one in seen}) == len(seen) > 5
    assert _tiles.tile(*ROW) == before


@INTERPRETED
def test_a_tile_that_changes_the_result_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter([torch.ones(3), torch.ones(3), torch.zeros(3)])
    with pytest.raises(SystemExit, match="computes something else"):
        tune.tune_row(*ROW, [lambda: next(calls)], lambda _: 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_without_a_gpu_there_is_nothing_to_tune(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main([])
    assert "needs a GPU" in capsys.readouterr().err


@INTERPRETED
@pytest.mark.parametrize("kernel", sorted({kernel for kernel, _, _ in _tiles.table()}))
def test_workloads_use_the_row_they_are_for(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ocvtp_kernels._launch import recording

    for name, arch, shape in _tiles.table():
        if (name, arch) != (kernel, "sm90"):
            continue
        monkeypatch.setattr(tune, "_BATCHES", (1,))
        with recording() as launches:
            for call in tune.workloads(kernel, shape, torch.device("cpu")):
                call()
        tile = _tiles.tile(kernel, arch, shape)
        own = [launch.tile for launch in launches if launch.kernel.fn.__name__ == kernel.split(".")[1]]
        assert own
        assert all(tile.items() <= launched.items() for launched in own)
