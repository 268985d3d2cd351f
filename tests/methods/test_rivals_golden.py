"""Published methods against what their authors' code computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.rivals.__main__ import main
from bench.rivals.golden import Case, Golden
from bench.rivals.methods import INPUTS, KINDS, Kind
from bench.rivals.run import check_file, check_folder
from ocvtp import methods
from tests.conftest import DATA
from tests.methods import rivals

FOLDER = DATA / "rivals"
FILES = sorted(path.stem for path in FOLDER.glob("*.safetensors") if path.stem not in INPUTS)


@pytest.mark.parametrize("name", FILES)
def test_what_the_official_code_computed(name: str) -> None:
    lines, proven = check_file(FOLDER / f"{name}.safetensors", KINDS[name.split("_")[0]])
    assert proven, "\n".join(lines)
    assert all(" ok, " in line for line in lines)


def test_every_method_has_golden_tensors() -> None:
    assert {name.split("_")[0] for name in FILES} == set(KINDS)
    named = {name.rstrip("+").split("_")[0] for name in rivals.ALL} | set(rivals.OTHERS.values())
    assert {name.split("_")[0] for name in named} <= set(KINDS)


def test_where_each_file_comes_from_is_said() -> None:
    text = (FOLDER / "README.md").read_text()
    for path in FOLDER.glob("*.safetensors"):
        about = Golden.read(path).about
        assert f"`{path.stem}`" in text
        if path.stem not in INPUTS:
            (line,) = (line for line in text.splitlines() if f"`{path.stem}`" in line and line[0] == "|")
            assert (
                f"`{about['repo']}` | `{about['commit'][:7]}` | {about['licence_of_official_code']} |" in line
            )


def test_the_folder_is_proven(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--golden", str(FOLDER)]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("proven\n")
    assert "NOT" not in printed
    assert "tower_clip: input of others" in printed


def copied(folder: Path, *names: str) -> None:
    for name in names:
        shutil.copy(FOLDER / f"{name}.safetensors", folder)


def rewritten(path: Path, **changed: torch.Tensor) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    save_file({**tensors, **changed}, path, metadata)


def stored(name: str, key: str) -> torch.Tensor:
    return Golden.read(FOLDER / f"{name}.safetensors").tensors[key].clone()


@pytest.mark.parametrize(
    ("name", "key", "by"),
    [
        ("hiprune_odd", "border.kept", 1),
        ("trim_odd", "n50.fixed_rows", 1e-4),
        ("trim_odd", "n50.rows", 0.1),
        ("prumerge_odd", "ties.fixed_kept", 1),
        ("tome_match", "cls.new_size", 1e-6),
        ("visionzip_odd", "next.order", 1),
        ("globalcom2_odd", "padded.crop_place", 1),
    ],
)
def test_one_altered_value_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, key: str, by: float
) -> None:
    copied(tmp_path, name, "hiprune_odd", "tome_match")
    value = stored(name, key)
    value.view(-1)[3] += by
    rewritten(tmp_path / f"{name}.safetensors", **{key: value})
    assert main(["--golden", str(tmp_path)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED: " in line]
    assert all(line.startswith(f"{name} FAILED: ") for line in failed)
    if key != "padded.crop_place":  # compared by true place
        (line,) = {line.split(" (")[0] for line in failed}
        assert line == f"{name} FAILED: {key}"
    assert failed


def test_a_file_of_no_known_kind_fails(tmp_path: Path) -> None:
    copied(tmp_path, "hiprune_odd")
    (tmp_path / "hiprune_odd.safetensors").rename(tmp_path / "someone_odd.safetensors")
    outcome = check_folder(tmp_path)
    assert not outcome.proven
    assert outcome.lines == ["someone_odd: FAILED: nothing answers for files of this kind"]


def test_a_tensor_that_nothing_looks_at_fails(tmp_path: Path) -> None:
    copied(tmp_path, "hiprune_odd")
    path = tmp_path / "hiprune_odd.safetensors"
    rewritten(path, **{"border.new": torch.ones(3)})
    lines, proven = check_file(path, KINDS["hiprune"])
    assert not proven
    assert "hiprune_odd FAILED: border.new: nothing looks at it" in lines


def test_a_missing_tower_an_empty_folder_and_a_broken_file_fail(tmp_path: Path) -> None:
    assert not check_folder(tmp_path).proven
    copied(tmp_path, "hiprune_tower")
    lines, proven = check_file(tmp_path / "hiprune_tower.safetensors", KINDS["hiprune"])
    assert not proven
    assert any("tower_clip.safetensors must lie beside it" in line for line in lines)
    (tmp_path / "trim_odd.safetensors").write_bytes(b"nothing")
    save_file({"x": torch.ones(1)}, tmp_path / "tome_match.safetensors")
    outcome = check_folder(tmp_path)
    assert not outcome.proven
    assert sum(line.startswith(("trim_odd: FAILED", "tome_match: FAILED")) for line in outcome.lines) == 2


def test_what_needs_a_tower_is_no_silent_pass(tmp_path: Path) -> None:
    path = tmp_path / "tome_tower.safetensors"
    numbers = [*methods.tome.even_schedule(576, 64, 23), 0]
    after = [577 - sum(numbers[: block + 1]) for block in range(24)]
    params = {
        "t64": {"r": numbers, "tokens_after_block": after},
        "parse_r": {"(6, [3, 2])": [3, 2, 0, 0, 0, 0]},
    }
    group = torch.arange(577)[None] % 65
    save_file(
        {
            "t64.group": group,
            "t64.size": torch.bincount(group[0])[None, :, None].float(),
            "t64.raster": torch.arange(1, 65)[None],
            "t64.tokens": torch.ones(1, 65, 2),
        },
        path,
        {"config": json.dumps({"params": params})},
    )
    lines, proven = check_file(path, KINDS["tome"])
    assert not proven
    assert lines[0].startswith("tome_tower t64: ok, ")
    assert "tome_tower FAILED: t64.tokens: no tower was run for it" in lines
    assert "tome_tower FAILED: t64.group: no tower was run for it" in lines


def test_a_file_that_is_one_case(tmp_path: Path) -> None:
    path = tmp_path / "some_a.safetensors"
    save_file({"stage0.kept": torch.arange(3), "logits": torch.ones(2)}, path, {"case": '{"name": "some_a"}'})

    def check(case: Case) -> None:
        case.same("stage0.kept", torch.arange(3))
        case.close("logits", torch.ones(2))

    lines, proven = check_file(path, Kind(check))
    assert proven
    assert lines == ["some_a: ok, 2 compared, largest difference 0.0e+00 (float32, float64)"]


def test_values_that_are_no_numbers_differ() -> None:
    golden = Golden(Path("some.safetensors"), {}, {"a.x": torch.ones(2), "a.i": torch.arange(2)})
    case = Case(golden, "a", torch.float32)
    case.close("x", torch.tensor([1.0, float("nan")]))
    case.close("x", torch.ones(3))
    case.same("i", torch.arange(3))
    assert [line.split(": ")[1].split(",")[0] for line in case.wrong] == [
        "off by nan",
        "shape [3]",
        "shape [3]",
    ]
    with pytest.raises(KeyError, match=r"has no a\.nothing"):
        case["nothing"]
