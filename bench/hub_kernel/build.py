"""The folder that goes to the hub, from the package in this repository.

    build.toml, torch-ext/ocvtp_kernels/    what `kernel-builder` builds: the package, its imports relative
    build/torch-{cuda,rocm,cpu}/            what `kernels` loads: the same, with metadata.json
    README.md, CARD.md                      the card

Operators are registered in ``torch.ops`` under the name that the package is loaded by. That is the ``id`` of
the metadata, in which a digest of the sources tells builds apart.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.hub_kernel.card import card, hardware, records
from bench.hub_kernel.imports import relative

ROOT = Path(__file__).parents[2]
PACKAGE = "ocvtp_kernels"
NAME = "ocvtp-kernels"
#: Major version of the public functions; by convention 0 is not for production.
VERSION = 0
#: `kernels` picks the folder of torch's backend. On a CPU the references run.
BACKENDS = ("cuda", "rocm", "cpu")

_OPS = '''"""Where the operators of this build are."""

import torch

_OPS_NAME = __name__.rpartition(".")[0].replace(".", "_")

ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """Full name of an operator."""
    return f"{_OPS_NAME}::{op_name}"
'''

# Older versions of `kernels` look for a folder of the package's name in each variant.
_COMPATIBLE = '''"""The folder above, for versions of `kernels` that look here."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parents[1] / "__init__.py"
_name = "{identifier}"
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, _path)
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
globals().update({{name: getattr(sys.modules[_name], name) for name in sys.modules[_name].__all__}})
__all__ = sys.modules[_name].__all__
'''


def build(out: Path, *, root: Path = ROOT, repo: str | None = None) -> dict[str, str]:
    """Write the folder ``out``, and tell each variant's id, by backend.

    Args:
        out: a folder that is not there, is empty, or was made by this: then its files are replaced, and what
            else lies beside them, a repository's own for example, stays.
        root: of this repository.
        repo: ``owner/name`` on the hub, for the card and build.toml.

    Raises:
        FileExistsError: ``out`` holds something else.
    """
    if out.exists() and any(out.iterdir()) and not _is_ours(out):
        raise FileExistsError(f"{out} holds something else")
    source = root / "kernels" / PACKAGE
    files = sources(source)
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\n{len(content)}\n".encode() + content)
    short = digest.hexdigest()[:7]
    licensed = license_of(root)
    for name in ("build", "torch-ext"):
        if (out / name).exists():
            shutil.rmtree(out / name)
    _write(out / "torch-ext" / PACKAGE, files)
    architectures = architectures_of(source)
    identifiers = {}
    for backend in BACKENDS:
        identifiers[backend] = f"_{PACKAGE}_{backend}_{short}"
        compatible = _COMPATIBLE.format(identifier=identifiers[backend]).encode()
        variant = {**files, f"{PACKAGE}/__init__.py": compatible}
        hardware_of: dict[str, Any] = {"type": backend}
        if backend in architectures:
            hardware_of["archs"] = architectures[backend]
        metadata = {
            "name": NAME,
            "id": identifiers[backend],
            "version": VERSION,
            "license": licensed,
            "python-depends": [],
            "kernel-depends": [],
            "backend": hardware_of,
            "digest": {"algorithm": "sha256", "files": _digests(variant)},
        }
        written = json.dumps(metadata, indent=2) + "\n"
        _write(out / "build" / f"torch-{backend}", {**variant, "metadata.json": written.encode()})
    results = root / "bench" / "results"
    counts = json.loads((results / "counts" / "aot.json").read_text())
    text = card(PACKAGE, repo, VERSION, licensed, public(source), hardware(records(results), counts))
    _write(
        out,
        {
            "README.md": text.encode(),
            "CARD.md": text.encode(),
            "LICENSE": (root / "LICENSE").read_bytes(),
            "build.toml": _build_toml(repo, licensed, architectures).encode(),
        },
    )
    return identifiers


def _is_ours(out: Path) -> bool:
    project = out / "build.toml"
    return project.is_file() and f'name = "{NAME}"\n' in project.read_text()


def sources(package: Path) -> dict[str, bytes]:
    """Every file of the hub's package, by path."""
    found = {}
    for path in sorted(package.rglob("*")):
        name = path.relative_to(package)
        if path.is_dir() or "__pycache__" in name.parts or path.suffix in (".pyc", ".typed"):
            continue
        content = path.read_bytes()
        if path.suffix == ".py":
            content = relative(content.decode(), PACKAGE, name.parts[:-1]).encode()
        found[name.as_posix()] = content
    found["__init__.py"] = _exporting(found["__init__.py"].decode(), operations(package)).encode()
    found["_ops.py"] = _OPS.encode()
    return found


def operations(package: Path) -> dict[str, list[str]]:
    """Dotted name of every public folder -> its ``__all__``."""
    found = {}
    for path in sorted(package.rglob("__init__.py")):
        inside = path.parent.relative_to(package).parts
        if inside:
            found[".".join(inside)] = list(_constant(path, "__all__"))
    return found


def public(package: Path) -> list[str]:
    """Functions and types, with the folder that they are in."""
    return [f"{folder}.{name}" for folder, names in operations(package).items() for name in names]


def architectures_of(package: Path) -> dict[str, list[str]]:
    """By backend, GPUs that there are tiles for."""
    path = package / "_arch.py"
    capabilities = sorted(_constant(path, "_CUDA"))
    return {
        "cuda": [f"{major}.{minor}" for major, minor in capabilities],
        "rocm": sorted(_constant(path, "_HIP")),
    }


def license_of(root: Path) -> str:
    """As pyproject.toml has it.

    Raises:
        ValueError: it has none.
    """
    for line in (root / "pyproject.toml").read_text().splitlines():
        if line.startswith("license = "):
            return str(ast.literal_eval(line.partition("=")[2].strip()))
    raise ValueError("pyproject.toml says no license")


def _constant(path: Path, name: str) -> Any:
    """What a module assigns to ``name``."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and _assigns(node, name):
            return ast.literal_eval(node.value)
    raise ValueError(f"{path.name} has no {name}")


def _exporting(source: str, folders: Mapping[str, list[str]]) -> str:
    """The package's ``__init__`` with all its folders, so that importing the kernel is enough."""
    tops = [name for name in folders if "." not in name]
    nested = [name.rpartition(".") for name in folders if "." in name]
    tree = ast.parse(source)
    (names,) = (node for node in tree.body if isinstance(node, ast.Assign) and _assigns(node, "__all__"))
    assert isinstance(names.value, ast.List)
    lines = source.splitlines()
    before, after = lines[: names.lineno - 1], lines[names.end_lineno :]
    imports = [f"from . import {name}" for name in tops]
    imports += [f"from .{above} import {name} as _  # noqa: F401" for above, _, name in nested]
    exported = sorted([*ast.literal_eval(names.value), *tops])
    return "\n".join([*before, *imports, "", f"__all__ = {exported!r}", *after, ""])


def _assigns(node: ast.Assign | ast.AnnAssign, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _build_toml(repo: str | None, licensed: str, architectures: Mapping[str, list[str]]) -> str:
    hub = f'\n[general.hub]\nrepo-id = "{repo}"\n' if repo is not None else ""
    return f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{licensed}"
backends = {json.dumps(list(BACKENDS))}
{hub}
[torch-noarch]
pyext = ["py", "json"]
cuda_capabilities = {json.dumps(architectures["cuda"])}
rocm_archs = {json.dumps(architectures["rocm"])}
"""


def _digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {
        name: base64.b64encode(hashlib.sha256(content).digest()).decode()
        for name, content in sorted(files.items())
    }


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
