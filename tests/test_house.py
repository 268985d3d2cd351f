"""Packaging and import behaviour: what `import ocvtp` costs, touches and installs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ocvtp

ROOT = Path(__file__).parents[1]


def run_python(code: str, *, cwd: Path = ROOT, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_cheap() -> None:
    code = "import time, torch; start = time.perf_counter(); import ocvtp;print(time.perf_counter() - start)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.3


def test_pruner_needs_neither_transformers_nor_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None        # importing either raises
sys.modules["transformers"] = None
import torch, ocvtp
pruner = ocvtp.OCPruner(ocvtp.PrunerConfig(in_dim=8, hidden_dim=8, slot_dim=8, ffn_dim=8))
print(pruner(torch.randn(1, 9, 8), keep=4).indices.shape)
"""
    assert run_python(code) == "torch.Size([1, 4])"


def test_what_lmms_eval_loads_in_every_process_loads_nothing() -> None:
    code = """
import sys
import ocvtp.harness
print([name for name in ("torch", "transformers", "lmms_eval") if name in sys.modules])
"""
    assert run_python(code) == "[]"


def test_every_public_name_exists() -> None:
    assert set(ocvtp.__all__) <= set(dir(ocvtp))
    for name in ocvtp.__all__:
        assert getattr(ocvtp, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ocvtp.nothing


def test_version_is_the_packages_version() -> None:
    from importlib.metadata import version

    assert ocvtp.__version__ == version("ocvtp")


def test_the_kernels_folder_does_not_shadow_hugging_faces_package(tmp_path: Path) -> None:
    """An installed package called `kernels` wins over our folder, even from the repository's root."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    # Site packages come after the current folder; appending imitates that. Where Hugging Face's own is
    # installed, that one is found; a bare folder would have no __file__.
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.__file__)"
    found = Path(run_python(code))
    assert found.name == "__init__.py"
    assert ROOT / "kernels" not in found.parents
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_line_on_other_tools_names_a_test_that_is_there() -> None:
    text = (ROOT / "docs/models.md").read_text().split("## Beside other tools")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 10
    for line in lines:
        named = re.findall(r"`(test_\w+\.py)`", line.rsplit("|", 2)[1])
        assert named, line
        assert all((ROOT / "tests/vlm" / name).is_file() for name in named), line


def test_the_wheel_holds_our_two_packages_and_works(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ocvtp", "kernels"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ocvtp", "ocvtp_kernels"}
    packaged = {name for name in names if name.endswith((".py", "py.typed"))}
    on_disk = {
        str(path.relative_to(base))
        for base in (ROOT, ROOT / "kernels")
        for package in ("ocvtp", "ocvtp_kernels")
        for path in (base / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert packaged == on_disk
    assert {"ocvtp/harness/tasks/ocvtp_paper.yaml", "ocvtp/harness/tasks/paper.py"} <= set(names)
    (entries,) = (tmp_path / "installed").glob("ocvtp-*.dist-info/entry_points.txt")
    assert "[lmms_eval.models]\nocvtp = ocvtp.harness:manifests\n" in entries.read_text()
    code = "import ocvtp, ocvtp_kernels.selection as s; print(ocvtp.__file__, s.__file__)"
    printed = run_python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert all(path.startswith(str(tmp_path / "installed")) for path in printed.split())
