"""Counts are those that were accepted, and what makes them worse is noticed."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ocvtp_kernels
from bench import snapshot
from bench.guard import __main__ as command
from bench.guard import accepted
from bench.guard.cases import cases, empty
from bench.guard.count import Counts, count
from bench.guard.remote import Remote, move, remote_device
from bench.guard.watch import Allocation
from ocvtp_kernels._library import launchers
from ocvtp_kernels._tiles import table
from ocvtp_kernels.selection import gather_tokens

pytest.importorskip("triton")

#: Operators that compare and copy. All others multiply, and have to say how much.
NO_PRODUCTS = {
    "select_tokens",
    "select_rows",
    "select_from_keys",
    "rows_from_keys",
    "gather_tokens",
    "scatter_tokens",
}
#: Launches that the documentation promises.
PROMISED = {
    "select_rows (triton)": 1,
    "select_rows, 2880 (triton)": 2,
    "select_from_keys (triton)": 1,
    "gather_tokens (triton)": 1,
    "received_attention (triton)": 3,
    "received_attention, packed (triton)": 3,
    "received_attention, lse (triton)": 2,
    "top_tokens fp16 (triton)": 5,
    "top_tokens fp32 (triton)": 17,
    "top_tokens fp16, 64 images (triton)": 17,
    "top_tokens fp16, 2880 (triton)": 17,
    "area_weighted_mse (triton)": 2,
    "area_weighted_mse, backward (triton)": 2 + 1,
    "area_weighted_mse, 2880 (triton)": 3,
    "area_weighted_mse, backward, 2880 (triton)": 3 + 1,
    "slot_attention, forward (triton)": 3 * 2,
    "slot_attention, forward and backward (triton)": 3 * 2 + 2,
    "coverage_error (triton)": 4,
    "merge_tokens (triton)": 3 + 2,
    "merge_tokens, 2880 (triton)": 3 + 2,
    "nearest_kept, masked (triton)": 3 + 1,
    "merge_by, backward (triton)": 2 + 1,
    "refine, rounds 1 (triton)": 4 + 5,
    "refine, rounds 2 (triton)": 4 + 2 * 5,
    "farthest_points (triton)": 3,
    "farthest_points, 2880 (triton)": 2 + 160,
    "largest_volume (triton)": 3,
    "largest_volume, 2880 (triton)": 2 + 160,
    "pruner, images 1 (triton)": 5 + 1,
    "pruner, images 4 (triton)": 5 + 1,
    "pruner, refine 2 (triton)": 5 + 1 + 4 + 2 * 5,
}


@pytest.fixture(scope="module")
def calls() -> dict[str, Callable[[], object]]:
    return cases()


# ------------------------------------------------------------------------------------------ what is accepted


@pytest.mark.slow
def test_counts_are_those_accepted() -> None:
    lines, same = accepted.compare(accepted.counted(), accepted.PATH)
    assert same, "\n".join(lines)


@pytest.mark.parametrize("name", PROMISED)
def test_launches_are_those_promised(name: str, calls: dict[str, Callable[[], object]]) -> None:
    for arch in sorted({arch for _, arch, _ in table()}):
        assert sum(count(calls[name], arch).launches.values()) == PROMISED[name]


def test_every_operator_is_counted_and_all_that_multiply_have_flops(
    calls: dict[str, Callable[[], object]],
) -> None:
    for module in pkgutil.walk_packages(ocvtp_kernels.__path__, "ocvtp_kernels."):
        if module.name.endswith(".op"):
            importlib.import_module(module.name)
    flops: dict[str, int] = {}
    for name, call in calls.items():
        if "(triton)" in name:
            for operator, n in count(call).flops.items():
                flops[operator] = max(n, flops.get(operator, 0))
    assert {f"ocvtp_kernels::{operator}" for operator in flops} == set(launchers())
    assert {operator for operator, n in flops.items() if n == 0} == NO_PRODUCTS


def test_nothing_waits_for_the_device_between_pixels_and_kept_rows() -> None:
    rows = snapshot.read(accepted.PATH)["cases"]
    waiting = {name for name, row in rows.items() if row["waits"]}
    assert waiting == {"forward of LLaVA, unpruned", "forward of LLaVA, pruned"}
    side = rows["vision side of LLaVA-1.5, images 1"]["launches"]
    merging = 5  # one more would line tokens up twice, for masses and for means
    assert sum(side.values()) == 3 + 5 + 1 + merging


def test_no_attention_map_is_allocated(calls: dict[str, Callable[[], object]]) -> None:
    queries, heads = 577, 16
    made = count(calls["received_attention (triton)"])
    assert largest(made) == heads * queries
    assert largest(count(calls["received_attention (torch)"])) > 100 * largest(made)


def test_no_matrix_of_tokens_and_kept_ones_is_allocated(calls: dict[str, Callable[[], object]]) -> None:
    tokens, keep, width = 2880, 160, 1024
    made = [torch.Size(one.shape).numel() for one in count(calls["merge_tokens, 2880 (triton)"]).allocated]
    assert max(made) == tokens * width  # the centred features
    assert tokens * keep not in made
    assert sum(made) < tokens * (width + 10) + keep * (width + 10) + width + 1
    in_pytorch = count(calls["merge_tokens, 2880 (torch)"]).allocated
    assert tokens * keep in [torch.Size(one.shape).numel() for one in in_pytorch]


def test_the_slots_map_is_allocated_only_if_asked_for(calls: dict[str, Callable[[], object]]) -> None:
    """The iterations' weights are [B, N, K] in the products' precision; the map is float32 [B, K, N]."""

    def maps(name: str) -> list[Allocation]:
        made = count(calls[name]).allocated
        return [one for one in made if one.shape == (1, 64, 576) and one.dtype == torch.float32]

    assert maps("top_tokens fp16 (triton)") == []
    assert maps("pruner, images 1 (triton)") == []
    assert len(maps("slot_assignment fp16 (triton)")) == 1


def largest(counts: Counts) -> int:
    """Elements of the largest allocation."""
    return max(torch.Size(one.shape).numel() for one in counts.allocated)


# --------------------------------------------------------------------------------------- what is noticed


def test_a_second_launch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from ocvtp_kernels.selection import triton as kernels

    x, kept = empty(2, 9, 16), empty(2, 4, dtype=torch.int64)

    def row() -> dict[str, Any]:
        return count(lambda: gather_tokens(x, kept)).row()

    before, launch = row(), kernels.launch

    def twice(*arguments: Any, **tile: Any) -> None:
        launch(*arguments, **tile)
        launch(*arguments, **tile)

    monkeypatch.setattr(kernels, "launch", twice)
    changes = snapshot.changes({"gather": before}, {"gather": row()}, whole=True)
    assert changes == ["gather: launches.gather 1 -> 2"]


def test_memory_is_noticed() -> None:
    x = empty(1000, 1000)
    assert count(lambda: x.mT[1:].unsqueeze(0)).allocated == ()
    assert count(lambda: x.mul_(2)).allocated == ()
    counts = count(lambda: (x.mT + 1).sum(dim=0))
    assert [one.nbytes for one in counts.allocated] == [4_000_000, 4_000]
    assert counts.operators == 2
    row = counts.row()
    assert (row["allocations"], row["allocated"], row["largest"]) == (2, 4_004_000, 4_000_000)


def test_products_are_noticed() -> None:
    x = empty(10, 20)
    counts = count(lambda: x @ x.mT)
    assert (counts.torch_flops, counts.flops) == (2 * 10 * 20 * 10, {})


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "aten::_local_scalar_dense": lambda x: x.sum().item(),
    "aten::nonzero": lambda x: x.nonzero(),
    "aten::index.Tensor": lambda x: x[x > 0],
    "aten::masked_select": lambda x: x.masked_select(x > 0),
    "aten::_unique2": lambda x: x.unique(),
    "aten::equal": lambda x: torch.equal(x, x + 0),
    "aten::repeat_interleave.Tensor": lambda x: torch.repeat_interleave(x.long()),
    "aten::_to_copy": lambda x: torch.ones(3).to(x.device),
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1, 2]),
    "__getitem__": lambda x: x[None, [0, 2]],
    "__setitem__": lambda x: x.clone().__setitem__(x.long(), 1.0),
    "aten::index.Tensor ": lambda x: x[torch.tensor([0, 2])],
    "aten::index_put_": lambda x: x.clone().__setitem__(torch.tensor([0, 2]), x[:2]),
}


@pytest.mark.parametrize("name", WAITS)
def test_waiting_is_noticed(name: str) -> None:
    x = torch.tensor([1.0, 0.0, 2.0])
    noticed = {name.strip(): 1}
    assert count(lambda: WAITS[name](x.to("meta", non_blocking=True))).waits == noticed
    remote = Remote(x)
    with remote_device() as waits:
        found = WAITS[name](remote)
    assert waits == noticed
    expected = WAITS[name](x)
    assert (found.held if isinstance(found, Remote) else found).__repr__() == expected.__repr__()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.ones(3).to(x.device, non_blocking=True),
        lambda x: x[x.long()],
        lambda x: x.masked_fill(x > 0, 1.0),
        lambda x: x[:, None][1:, 0],
        lambda x: x.clone().__setitem__(slice(1), 1.0),
        lambda x: x.clone().__setitem__(x > 0, 1.0),
        lambda x: x.clone().index_fill_(0, x.long(), 1.0),
        lambda x: torch.repeat_interleave(x.long(), output_size=3),
        lambda x: torch._assert_async(x.sum() > 0, "message"),
    ],
)
def test_what_does_not_wait(call: Callable[[torch.Tensor], object]) -> None:
    assert count(lambda: call(empty(3))).waits == {}
    remote = Remote(torch.tensor([1.0, 0.0, 2.0]))
    with remote_device() as waits:
        call(remote)
    assert not +waits


def test_a_device_with_values_computes_as_a_cpu_does() -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)).eval()
    x = torch.randn(5, 8)
    with torch.no_grad():
        want = layers(x).relu_().tolist()
        move(layers)
        with remote_device() as waits:
            made = layers(Remote(x))
            assert made.relu_() is made
            assert made.device.type == "meta"
            assert made.tolist() == want
            assert f"{made.sum() > 0}" == "True"
            assert (torch.tensor([1, 2], device="meta") + 1).cpu().tolist() == [2, 3]
            assert torch.zeros(2).tolist() == [0, 0]  # made on the host, and read there
    assert waits == {"tolist": 1, "__format__": 1, "tensor": 1, "aten::_to_copy": 1}


# ---------------------------------------------------------------------------------------------- comparison

ROW = {"launches": {"select": 1}, "flops": {"gather": 0}, "operators": 5, "waits": {}}


def written(path: Path, rows: dict[str, Any], **versions: str) -> Path:
    path.write_text(json.dumps({"versions": {**accepted.versions(), **versions}, "cases": rows}))
    return path


def test_every_change_has_a_line(tmp_path: Path) -> None:
    path = written(tmp_path / "guard.json", {"a": ROW, "b": ROW, "gone": ROW})
    worse = {**ROW, "launches": {"select": 2, "gather": 1}, "waits": {"aten::item": 1}}
    lines, same = accepted.compare({"a": ROW, "b": worse, "c": {"flops": {}}}, path)
    assert not same
    assert lines == [
        "b: launches.select 1 -> 2",
        "b: launches.gather none -> 1",
        "b: waits.aten::item none -> 1",
        'c: new, {"flops": {}}',
        "gone: gone",
        "5 differences to guard.json. If that is meant, python -m bench.guard --write accepts it.",
    ]
    assert accepted.compare({"a": ROW, "b": ROW, "gone": ROW}, path)[1]


def test_another_torch_is_held_to_our_own_counts_only(tmp_path: Path) -> None:
    path = written(tmp_path / "guard.json", {"a": ROW}, torch="1.0")
    lines, same = accepted.compare({"a": {**ROW, "operators": 6}}, path)
    assert same
    assert "only launches and FLOPs compared" in lines[0]
    lines, same = accepted.compare({"a": {**ROW, "launches": {"select": 2}}}, path)
    assert not same
    assert lines[1] == "a: launches.select 1 -> 2"


def test_the_command_fails_on_a_change_until_it_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accepted, "PATH", tmp_path / "counts" / "guard.json")
    monkeypatch.setattr(accepted, "counted", lambda: {"a": ROW})
    assert command.main([]) == 1
    assert "there is no guard.json" in capsys.readouterr().out
    assert command.main(["--write"]) == 0
    assert command.main([]) == 0
    assert "1 cases, all as in guard.json" in capsys.readouterr().out
    monkeypatch.setattr(accepted, "counted", lambda: {"a": {**ROW, "operators": 6}})
    assert command.main([]) == 1
    assert "a: operators 5 -> 6" in capsys.readouterr().out


def test_a_snapshot_has_a_line_for_each_row_and_comes_back(tmp_path: Path) -> None:
    record = {"versions": {"torch": "2.13"}, "cases": {"a": ROW, "b": {}}}
    snapshot.write(tmp_path / "x.json", record, depth=2)
    assert snapshot.read(tmp_path / "x.json") == record
    lines = (tmp_path / "x.json").read_text().splitlines()
    assert sum("launches" in line for line in lines) == 1
    assert len(lines) == 9
