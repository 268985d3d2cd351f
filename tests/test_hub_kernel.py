"""The folder for Hugging Face's kernel hub: as `kernels` loads it, it is the package under another name."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ocvtp_kernels.coverage
import ocvtp_kernels.diversity
import ocvtp_kernels.merge
import ocvtp_kernels.received_attention
import ocvtp_kernels.reconstruction
import ocvtp_kernels.selection
import ocvtp_kernels.slot_attention.training
from bench.hub_kernel.build import BACKENDS, PACKAGE, ROOT, VERSION, build
from bench.hub_kernel.card import card, hardware, records
from bench.hub_kernel.imports import AbsoluteImportError, relative
from ocvtp_kernels import _library
from ocvtp_kernels._arch import interpreting
from tests.conftest import make_pruner

SOURCE = ROOT / "kernels" / PACKAGE
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "kernel"
    build(out)
    return out


def load(variant: Path) -> ModuleType:
    """As `kernels/importer.py` of version 0.17 does: a variant's ``__init__``, by the id of its metadata."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Iterator[ModuleType]:
    before = set(sys.modules)
    yield load(folder / "build" / "torch-cpu")
    for name in set(sys.modules) - before:
        if name.startswith("_ocvtp_kernels_cpu"):
            del sys.modules[name]


# -------------------------------------------------------------------------------------------------- imports


def resolved(source: str, inside: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """Module and names of every ``from`` import, in order; relative ones as if from the package's top."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            parts = [node.module] if node.module else []
            if node.level:
                parts = [PACKAGE, *inside[: len(inside) + 1 - node.level], *parts]
            found.append((".".join(parts), tuple(alias.name for alias in node.names)))
    return found


def test_imports_are_relative_and_the_same() -> None:
    made = 0
    for path in SOURCE.rglob("*.py"):
        inside = path.relative_to(SOURCE).parts[:-1]
        source = path.read_text()
        rewritten = relative(source, PACKAGE, inside)
        assert resolved(rewritten, inside) == resolved(source, inside)
        for before, after in zip(source.splitlines(), rewritten.splitlines(), strict=True):
            if before != after:
                made += 1
                words = before.split()
                assert words[0] == "from"
                assert words[1].split(".")[0] == PACKAGE
                assert after.split()[2:] == words[2:]
        for node in ast.walk(ast.parse(rewritten)):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert str(node.module).split(".")[0] != PACKAGE
    assert made > 100


@pytest.mark.parametrize(
    ("inside", "before", "after"),
    [
        ((), "from a import b\n", "from . import b\n"),
        ((), "from a._c import b\n", "from ._c import b\n"),
        (("d",), "from a.d import (\n    b,\n)\n", "from ..d import (\n    b,\n)\n"),
        (
            ("d", "e"),
            "def f():\n    from a.d.e import b as c  # a\n",
            "def f():\n    from ...d.e import b as c  # a\n",
        ),
        (("d",), "import ab\nfrom ab.a import c\nx = 'from a import b'\n", None),
        ((), "from .a import b", None),
    ],
)
def test_nothing_else_changes(inside: tuple[str, ...], before: str, after: str | None) -> None:
    assert relative(before, "a", inside) == (before if after is None else after)


@pytest.mark.parametrize(
    "source", ["import a\n", "import os, a.b\n", "x = 1; from a import b\n", "from  a import b\n"]
)
def test_what_can_not_be_made_relative_is_an_error(source: str) -> None:
    with pytest.raises(AbsoluteImportError, match="line 1"):
        relative(source, "a", ())


# --------------------------------------------------------------------------------------------------- layout


def test_every_variant_is_complete(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "build").iterdir()) == sorted(
        f"torch-{b}" for b in BACKENDS
    )
    identifiers = set()
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert re.fullmatch(rf"_ocvtp_kernels_{backend}_[0-9a-f]{{7}}", metadata["id"])
        identifiers.add(metadata["id"][-7:])
        assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", metadata["name"])
        assert metadata["name"].replace("-", "_") == PACKAGE
        assert (metadata["version"], metadata["license"]) == (VERSION, "MIT")
        assert metadata["backend"]["type"] == backend
        assert ("archs" in metadata["backend"]) == (backend != "cpu")
        files = {path.relative_to(variant).as_posix(): path for path in variant.rglob("*") if path.is_file()}
        del files["metadata.json"]
        assert metadata["digest"]["files"] == {
            name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
            for name, path in files.items()
        }
        ours = {
            path.relative_to(SOURCE).as_posix()
            for path in SOURCE.rglob("*")
            if path.suffix in (".py", ".json")
        }
        assert set(files) == ours | {"_ops.py", f"{PACKAGE}/__init__.py"}
    assert len(identifiers) == 1
    cuda = json.loads((folder / "build/torch-cuda/metadata.json").read_text())["backend"]["archs"]
    assert {"8.0", "8.9", "9.0", "10.0"} <= set(cuda)


def test_the_project_is_that_of_the_variants(folder: Path) -> None:
    project = folder / "torch-ext" / PACKAGE
    for path in project.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (folder / "build/torch-cuda" / path.relative_to(project)).read_bytes()
    text = (folder / "build.toml").read_text()
    assert 'name = "ocvtp-kernels"' in text
    assert "[torch-noarch]" in text
    assert "[general.hub]" not in text
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_builder_needs_the_standard_library_alone(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-S",
        "-m",
        "bench.hub_kernel",
        "--out",
        str(tmp_path / "out"),
        "--repo",
        "me/it",
    ]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert len(printed.splitlines()) == len(BACKENDS)
    assert 'repo-id = "me/it"' in (tmp_path / "out/build.toml").read_text()
    assert 'get_kernel("me/it", version=0' in (tmp_path / "out/README.md").read_text()


def test_only_its_own_files_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    build(out)
    (out / "build" / "stale").touch()
    (out / ".git").mkdir()
    build(out)
    assert not (out / "build" / "stale").exists()
    assert (out / ".git").exists()
    for name, text in (("thesis.txt", ""), ("build.toml", '[general]\nname = "another-kernel"\n')):
        other = tmp_path / name.partition(".")[0]
        (other / "build").mkdir(parents=True)
        (other / name).write_text(text)
        with pytest.raises(FileExistsError, match="something else"):
            build(other)
        assert (other / name).read_text() == text
        assert (other / "build").exists()


# --------------------------------------------------------------------------------------------------- loaded


def operations(of: Any) -> dict[str, Callable[[], object]]:
    """Main operations of a package, on small inputs, by kernels where those run."""
    backend = "triton" if interpreting() or DEVICE == "cuda" else "torch"
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    attention, fill, x = randn(2, 5, 21).softmax(dim=1), randn(2, 21), randn(2, 21, 24)
    indices = torch.arange(6, device=DEVICE).expand(2, 6) * 3
    q, k = randn(2, 2, 9, 16), randn(2, 2, 11, 16)
    weights = of.slot_attention.SlotAttentionWeights(
        *(w.detach().to(DEVICE) for w in make_pruner().weights())
    )
    slots, features = randn(1, 4, 32), randn(2, 9, 48)

    def inference() -> object:
        folded = of.slot_attention.fold(weights)
        start = of.slot_attention.start_from_slots(slots, folded)
        return of.slot_attention.top_tokens(features, start, folded, backend=backend)

    def trained() -> object:
        leaf = x.clone().requires_grad_()
        rows = of.merge.merge_tokens(leaf, indices, backend=backend).rows
        return torch.autograd.grad(rows.square().sum(), leaf)

    return {
        "select_tokens": lambda: of.selection.select_tokens(attention, 6, fill, backend=backend),
        "gather_tokens": lambda: of.selection.gather_tokens(x, indices, backend=backend),
        "received_attention": lambda: of.received_attention.received_attention(q, k, backend=backend),
        "area_weighted_mse": lambda: of.reconstruction.area_weighted_mse(
            x, x + 1, attention, backend=backend
        ),
        "coverage_error": lambda: of.coverage.coverage_error(x, indices, backend=backend),
        "merge_tokens, backward": trained,
        "farthest_points": lambda: of.diversity.farthest_points(x, 4, backend=backend),
        "top_tokens": inference,
    }


def tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for one in value for tensor in tensors(one)] if isinstance(value, tuple | list) else []


@pytest.mark.parametrize("name", operations(ocvtp_kernels))
def test_it_computes_what_the_package_does(kernel: ModuleType, name: str) -> None:
    want, got = tensors(operations(ocvtp_kernels)[name]()), tensors(operations(kernel)[name]())
    assert len(want) == len(got) > 0
    for ours, theirs in zip(want, got, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_it_is_another_package(kernel: ModuleType) -> None:
    """Nothing in it comes from the installed one; operators are its own, under the id of the metadata."""
    name = kernel.__name__
    own = {module for module in sys.modules if module.startswith(f"{name}.")}
    assert len(own) > 30
    for module in own:
        for value in vars(sys.modules[module]).values():
            assert getattr(value, "__module__", None) is None or not str(value.__module__).startswith(PACKAGE)
    theirs = sys.modules[f"{name}._library"].launchers()
    assert {one.replace(name, PACKAGE) for one in theirs} == set(_library.launchers())
    assert all(one.startswith(f"{name}::") for one in theirs)
    ops = importlib.import_module(f"{name}._ops")
    assert ops.add_op_namespace_prefix("select") == f"{name}::select"
    assert ops.ops.received_attention.default is not torch.ops.ocvtp_kernels.received_attention.default


def test_public_names_are_there(kernel: ModuleType, folder: Path) -> None:
    listed = re.findall(r"^- `([\w.]+)`$", (folder / "README.md").read_text(), flags=re.MULTILINE)
    assert len(listed) > 25
    for name in listed:
        value: Any = kernel
        for part in name.split("."):
            value = getattr(value, part)
        assert name.split(".")[0] in kernel.__all__
    assert {"Backend", "BackendUnavailableError", "selection"} <= set(kernel.__all__)


def test_older_loaders_find_the_same(kernel: ModuleType, folder: Path) -> None:
    path = folder / "build/torch-cpu" / PACKAGE / "__init__.py"
    spec = importlib.util.spec_from_file_location("found_by_an_older_loader", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.selection is kernel.selection
    assert module.__all__ == kernel.__all__


def test_two_builds_in_one_process(kernel: ModuleType, tmp_path: Path) -> None:
    root = tmp_path / "source"
    for name in ("kernels", "bench/results/counts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, root)
    changed = root / "kernels" / PACKAGE / "_alike.py"
    changed.write_text(changed.read_text() + "\n")
    build(tmp_path / "out", root=root)
    other = load(tmp_path / "out" / "build" / "torch-cpu")
    try:
        assert other.__name__ != kernel.__name__
        x, indices = torch.ones(1, 4, 3), torch.tensor([[0, 2]])
        assert torch.equal(
            other.selection.gather_tokens(x, indices), kernel.selection.gather_tokens(x, indices)
        )
    finally:
        for name in [name for name in sys.modules if name.startswith(other.__name__)]:
            del sys.modules[name]


def test_hugging_faces_loader_takes_it(folder: Path) -> None:
    hub = pytest.importorskip("kernels", reason="pip install kernels")
    if not hasattr(getattr(hub, "_rust", None), "Build"):
        pytest.skip("needs kernels 0.17")
    loaded = hub.get_local_kernel(folder, backend="cpu")
    (known,) = (one for one in hub.get_loaded_kernels() if one.module is loaded)
    assert str(known.metadata.name) == "ocvtp-kernels"
    assert loaded.__name__ == known.metadata.id
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        digest = hub._rust.Metadata.read_from_file(variant / "metadata.json").digest
        digest.validate(hub._rust.Digest.hash_variant(hub._rust.DigestAlgorithm.SHA256, variant))
    hub._rust.Build.open(folder)  # build.toml is understood
    x, indices = torch.ones(1, 4, 3), torch.tensor([[0, 2]])
    assert torch.equal(loaded.selection.gather_tokens(x, indices), x[:, :2])


# ----------------------------------------------------------------------------------------------------- card


def test_the_card_is_what_the_hub_reads(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert text == (folder / "CARD.md").read_text()
    front = text.split("---\n")[1].splitlines()
    assert front[:2] == ["library_name: kernels", "license: mit"]
    assert "tags:" in front
    # Nothing of the template is left.
    assert not re.search(r"\b(NAME|LICENSE|LOAD|OPERATIONS|HARDWARE)\b|[{}]", text)


def test_the_example_runs(kernel: ModuleType, folder: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    body = code.split('get_local_kernel(Path("."))')[1].replace('"cuda"', f'"{DEVICE}"')
    scope: dict[str, Any] = {"torch": torch, "ocvtp_kernels": kernel}
    exec(body, scope)
    assert scope["indices"].shape == (1, 64)


def test_hardware_is_what_records_say(tmp_path: Path) -> None:
    counts = {"triton": "3.9.0", "targets": {"sm_90": {"a": {"spills": 0}}, "gfx942": {"b": {"spills": 0}}}}
    cpu, gpu = {"device": "AMD EPYC"}, {"device": "NVIDIA H100", "multiprocessors": 132}
    text = hardware([cpu], counts)
    assert text.startswith("**Nothing of it has been timed on a GPU yet**")
    assert "without spills, for sm_90, gfx942 (Triton 3.9.0)" in text
    counts["targets"]["sm_90"]["a"]["spills"] = 3
    text = hardware([cpu, gpu, gpu], counts)
    assert text.startswith("Records of these GPUs are in the source repository: NVIDIA H100. ")
    assert "with 3 spills" in text
    assert "compiled" not in hardware([], {})
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100" / "micro.json").write_text(json.dumps(gpu))
    (tmp_path / "h100" / "other.json").write_text("[]")
    assert records(tmp_path) == [gpu]
    assert "NVIDIA H100" in card("it", None, 0, "MIT", [], hardware(records(tmp_path), counts))


def test_records_of_this_repository_are_read() -> None:
    assert len(records(ROOT / "bench/results")) > 10
