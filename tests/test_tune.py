"""The tuner: what it tries, what it keeps, what it writes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

import ocvtp_kernels
from bench import tune
from bench.aot import TARGETS
from bench.micro.slot_inputs import Widths, random_features, random_models
from ocvtp_kernels import _tiles
from ocvtp_kernels._launch import recording
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
        if not shape.endswith(" rows"):  # tiles by number of rows: where they were worth it
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
        assert len(tried) <= 40 or not kernel.startswith("slot_attention")  # each compiles for seconds
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
    for name, arch, shape in _tiles.table():
        if (name, arch) != (kernel, "sm90"):
            continue
        monkeypatch.setattr(tune, "_BATCHES", (1,))
        monkeypatch.setattr(tune, "_LOOPED", 1)
        # No other row of the table has so many warps.
        tile = {**_tiles.tile(kernel, arch, shape), "num_warps": 64}
        with tune.replaced(kernel, arch, shape, tile), recording() as launches:
            for call in tune.workloads(kernel, shape, torch.device("cpu")):
                call()
        own = [launch.tile for launch in launches if launch.kernel.fn.__name__ == kernel.split(".")[1]]
        assert own
        for launched in own:
            size = tile.get("SIZE")  # rows of any width, which its launcher turns into a number of them
            assert size is None or launched["BR"] * launched["CP"] == size
            assert {name: value for name, value in tile.items() if name != "SIZE"}.items() <= launched.items()
        if kernel == "slot_attention.slot_loop":  # and who sets its counters to zero
            names = ["normalise", "slot_loop"]
            assert [launch.kernel.fn.__name__ for launch in launches] == names * (len(launches) // 2)
        elif kernel.startswith("slot_attention"):
            assert own == [launch.tile for launch in launches]  # it alone is timed


def slot_kernel(kernel: str, shape: str, *, tf32: bool = False) -> tune.SlotKernel:
    """At a size that the interpreter runs in half a second."""
    widths = Widths(48, 40, 32, 24)
    features = random_features(1, 33, 48, torch.float16, torch.Generator().manual_seed(0))
    models = random_models(widths, 16, torch.device("cpu"))
    return tune.SlotKernel(kernel, shape, features, models.mixed if "16bit" in shape else models.folded, tf32)


def few(kernel: str) -> dict[str, tuple[int, ...]]:
    """The least and the most that it tries of each option."""
    return {name: (min(values), max(values)) for name, values in tune._CANDIDATES[kernel].items()}


SLOT_ROWS = [
    ("slot_attention.normalise", "any"),
    ("slot_attention.linear", "encode-2-16bit"),
    ("slot_attention.linear", "queries-32bit"),
    ("slot_attention.attend", "K<=64-16bit"),
    ("slot_attention.update", "K<=64-32bit"),
    ("slot_attention.gru", "any-16bit"),
    ("slot_attention.linear", "mlp-2-16bit, few rows"),
    ("slot_attention.slot_loop", "K<=64-16bit"),
]


@INTERPRETED
@pytest.mark.parametrize(("kernel", "shape"), SLOT_ROWS)
def test_a_row_of_slot_attention_is_tuned(kernel: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile that is tried gives the same result, and what is timed runs this kernel with it."""
    grid = {name: values for name, values in few(kernel).items() if not name.startswith("num_")}
    monkeypatch.setitem(tune._CANDIDATES, kernel, {**grid, "num_stages": (9,)})
    own = slot_kernel(kernel, shape)
    timed = []

    def timer(call: tune.Call) -> float:
        with recording() as launches:
            call()
        own_name = kernel.split(".")[1]
        first = {"normalise"} if own_name == "slot_loop" else set()
        assert {launch.kernel.fn.__name__ for launch in launches} == {own_name} | first
        launches = [launch for launch in launches if launch.kernel.fn.__name__ == own_name]
        assert len({launch.tile["num_stages"] for launch in launches}) == 1
        timed.append(launches[-1].tile["num_stages"])
        return 0.5 if timed[-1] == 9 else 1.0

    tile, gain = tune.tune_row(kernel, "sm90", shape, [own], timer)
    assert (tile["num_stages"], gain) == (9, pytest.approx(2.0))
    assert timed == [_tiles.tile(kernel, "sm90", shape)["num_stages"]] + [9] * (len(timed) - 1)
    assert len(timed) > 2


@INTERPRETED
def test_a_kernel_alone_repeats_what_the_whole_call_gave_it() -> None:
    own = slot_kernel("slot_attention.gru", "any-32bit")
    own.result()
    slots = own._own[-1].arguments[10]
    before = slots.clone()
    assert before.isfinite().all()
    slots.fill_(torch.nan)
    own()
    assert torch.equal(slots, before)
    assert len(own._own) == 2  # both iterations that update slots


@INTERPRETED
@pytest.mark.parametrize(
    ("shape", "tf32", "allowed"),
    [("any-32bit", False, 1e-4), ("any-32bit", True, 5e-2), ("any-16bit", False, 5e-2)],
)
def test_results_of_slot_attention_may_differ_by_rounding_alone(
    shape: str, tf32: bool, allowed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ("slot_attention.gru", "sm90", shape)
    own = slot_kernel(row[0], shape, tf32=tf32)
    for factor, wrong in ((1 + allowed / 2, False), (1 + 2 * allowed, True)):
        results = iter([1.0, 1.0, factor])
        monkeypatch.setattr(own, "result", lambda results=results: torch.tensor([next(results, 1.0)]))
        with pytest.raises(SystemExit, match="something else") if wrong else contextlib.nullcontext():
            tune.tune_row(*row, [own], lambda _: 1.0)
