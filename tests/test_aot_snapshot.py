"""What kernels need is held to what was accepted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import snapshot
from ocvtp_kernels._launch import Launch

pytest.importorskip("triton")

from bench import aot, aot_snapshot
from bench.aot import TARGETS

ROOT = Path(__file__).parents[1]
NUMBERS = {"registers": 40, "spills": 0, "shared": 1024, "matrix": "HMMA"}
ROW = {**NUMBERS, "program": "c0ffee"}


def launch(x: torch.Tensor, stride: int, size: int) -> Launch:
    """Of a kernel that specialises on its stride and not on its size."""

    def parameter(name: str, **is_: bool) -> Any:
        return SimpleNamespace(**{"name": name, "is_constexpr": False, "do_not_specialize": False, **is_})

    kernel = SimpleNamespace(
        params=[
            parameter("x_ptr"),
            parameter("stride"),
            parameter("N", do_not_specialize=True),
            parameter("BLOCK", is_constexpr=True),
        ]
    )
    return Launch(kernel, (1,), (x, stride, size), {"BLOCK": 16})


def test_launches_of_one_name_are_told_apart_by_what_differs() -> None:
    single, half = torch.empty(1), torch.empty(1, dtype=torch.float16)
    made = [launch(single, 32, 5), launch(single, 1, 5), launch(single, 7, 5), launch(half, 7, 16)]
    assert aot_snapshot.keys(made, ["a", "a", "a", "b"]) == [
        "a [stride=16*i32]",
        "a [stride=1]",
        "a [stride=i32]",
        "b",
    ]
    wide = aot_snapshot.keys([launch(single, 3, 5), launch(half, 3, 2**31)], ["a", "a"])
    assert wide == ["a [x_ptr=float32 N=i32]", "a [x_ptr=float16 N=i64]"]
    with pytest.raises(ValueError, match="one name"):
        aot_snapshot.keys([launch(single, 3, 5), launch(single, 5, 7)], ["a", "a"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = {"sm_80": {"gather 1": ROW, "select 1": ROW}, "sm_90": {"gather 1": ROW}}
    aot_snapshot.renew(found, version="3.9.0", commit="abc", order=TARGETS, path=tmp_path / "aot.json")
    return tmp_path / "aot.json"


def test_every_difference_has_a_line(path: Path) -> None:
    worse = {**ROW, "registers": 48, "shared": 2048}
    found = {"sm_80": {"gather 1": worse, "gather 2": ROW}}
    lines, same = aot_snapshot.compare(found, version="3.9.0", whole=True, path=path)
    assert not same
    assert lines[:-1] == [
        "sm_80 gather 1: registers 40 -> 48",
        "sm_80 gather 1: shared 1024 -> 2048",
        f"sm_80 gather 2: new, {json.dumps(NUMBERS)}",
        "sm_80 select 1: gone",
    ]
    assert "python -m bench.aot --write" in lines[-1]


def test_a_part_is_compared_with_that_part(path: Path) -> None:
    part = {"sm_80": {"gather 1": ROW}}
    assert aot_snapshot.compare(part, version="3.9.0", whole=False, path=path)[1]
    assert not aot_snapshot.compare(part, version="3.9.0", whole=True, path=path)[1]


def test_another_program_with_the_same_numbers_is_no_difference(path: Path) -> None:
    found = {"sm_80": {"gather 1": {**ROW, "program": "beef"}}}
    lines, same = aot_snapshot.compare(found, version="3.9.0", whole=False, path=path)
    assert same
    assert lines[0].startswith("1 are other programs than aot.json is of")


def test_rows_hold_for_the_same_program_and_triton_but_for_some(tmp_path: Path) -> None:
    path = tmp_path / "aot.json"
    assert aot_snapshot.trusted("3.9.0", path) == {}
    doubted = {**ROW, "program": "beef0"}
    found = {"sm_80": {"gather 1": ROW, "gather 2": doubted}}
    aot_snapshot.renew(found, version="3.9.0", commit="abc", path=path)
    assert aot_snapshot.trusted("3.9.0", path) == {"sm_80": {"gather 1": ROW}}
    assert aot_snapshot.trusted("3.9.1", path) == {}


def test_another_triton_is_not_compared(path: Path) -> None:
    lines, same = aot_snapshot.compare({"sm_80": {}}, version="3.3.0", whole=True, path=path)
    assert same
    assert lines == ["aot.json is of triton 3.9.0, this is 3.3.0: not compared"]


def test_no_snapshot_is_a_failure(tmp_path: Path) -> None:
    lines, same = aot_snapshot.compare({}, version="3.9.0", whole=True, path=tmp_path / "aot.json")
    assert not same
    assert "--write" in lines[0]


def test_only_what_was_compiled_is_renewed(path: Path) -> None:
    better = {**ROW, "registers": 30}
    aot_snapshot.renew(
        {"sm_80": {"gather 2": better}}, version="3.9.0", commit="d", kernels=["gather"], path=path
    )
    targets = snapshot.read(path)["targets"]
    assert targets == {"sm_80": {"gather 2": better, "select 1": ROW}, "sm_90": {"gather 1": ROW}}
    aot_snapshot.renew({"sm_80": {"gather 2": better}}, version="3.9.0", commit="d", path=path)
    assert snapshot.read(path)["targets"]["sm_80"] == {"gather 2": better}
    assert snapshot.read(path)["targets"]["sm_90"] == {"gather 1": ROW}


def test_versions_are_not_mixed(path: Path) -> None:
    before = path.read_text()
    with pytest.raises(aot_snapshot.MixedVersionsError, match=r"3\.9\.0, this is 3\.3\.0"):
        aot_snapshot.renew({"sm_80": {}}, version="3.3.0", commit="d", path=path)
    assert path.read_text() == before
    everything: aot_snapshot.Rows = {"sm_80": {}, "sm_90": {"gather 1": ROW}}
    aot_snapshot.renew(everything, version="3.3.0", commit="d", path=path)
    assert snapshot.read(path)["triton"] == "3.3.0"


def test_the_committed_snapshot_covers_every_target_without_a_spill() -> None:
    targets = snapshot.read(aot_snapshot.PATH)["targets"]
    assert list(targets) == list(TARGETS)
    for target, rows in targets.items():
        assert rows
        for key, row in rows.items():
            copies = {"wide"} if key.split()[0] in aot.COPIES else set()
            assert row.keys() == ROW.keys() | copies
            assert row["spills"] == 0
            assert row["shared"] <= TARGETS[target].shared_limit


def compiled(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command on one small kernel, with its snapshot in ``folder``."""
    code = (
        "import sys; from pathlib import Path; from bench import aot, aot_snapshot\n"
        "if __name__ == '__main__':\n"
        f"    aot_snapshot.PATH = Path({str(folder)!r}) / 'aot.json'\n"
        "    sys.exit(aot.main(sys.argv[1:]))"
    )
    (folder / "run.py").write_text(code)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    search = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "ignore", folder / "run.py", "--target", "gfx942", "--jobs", "1", *arguments],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_compares_and_accepts(tmp_path: Path) -> None:
    one = "--kernel", "head_mean"
    assert compiled(tmp_path, *one).returncode == 1
    result = compiled(tmp_path, *one, "--write")
    assert result.returncode == 0, result.stderr
    record = snapshot.read(tmp_path / "aot.json")
    ((key, row),) = record["targets"]["gfx942"].items()
    assert row["registers"] > 0
    committed = snapshot.read(aot_snapshot.PATH)
    if committed["triton"] == record["triton"]:
        assert committed["targets"]["gfx942"][key] == row

    def changed(**fields: object) -> subprocess.CompletedProcess[str]:
        row.update(fields)
        (tmp_path / "aot.json").write_text(json.dumps(record))
        return compiled(tmp_path, *one, "--changed")

    program = row["program"]
    row["registers"] += 1  # that nobody measured
    if not program.endswith("0"):
        result = changed()
        assert result.returncode == 0, result.stderr
        assert "0 kernels compiled" in result.stdout
        assert "1 are the programs" in result.stdout
    result = changed(program=f"another {program}")
    assert result.returncode == 1, result.stderr
    assert "1 kernels compiled" in result.stdout
    assert f"gfx942 {key}: registers {row['registers']} -> {row['registers'] - 1}" in result.stdout
    assert "python -m bench.aot --write" in result.stdout
