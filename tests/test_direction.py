"""Which way imports run: no circle among modules, and no folder imports one above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASES = {"ocvtp": ROOT / "ocvtp", "ocvtp_kernels": ROOT / "kernels/ocvtp_kernels", "bench": ROOT / "bench"}

# Lowest first. A module belongs to its longest prefix here, and imports from its own layer or lower ones.
# Layers on one line know nothing of each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("ocvtp_kernels",),
    ("ocvtp.watch",),
    ("ocvtp.selection", "ocvtp.checks", "ocvtp.atomic", "ocvtp.stored", "ocvtp.images", "ocvtp.visualize"),
    ("ocvtp.pruner",),
    ("ocvtp.methods", "ocvtp.metrics"),
    ("ocvtp.vlm.contracts",),
    ("ocvtp.vlm.layouts",),
    ("ocvtp.vlm.towers",),
    ("ocvtp.vlm.families", "ocvtp.vlm.encode", "ocvtp.vlm.rivals"),
    ("ocvtp.vlm.in_llm",),
    ("ocvtp.vlm.call",),
    ("ocvtp.vlm",),
    ("ocvtp",),  # the public names
    ("ocvtp.cost", "ocvtp.training", "ocvtp.serving"),
    ("ocvtp.commands",),
    ("ocvtp.cli", "ocvtp.harness"),
    ("bench",),
)
# Operations share nothing but the files beside them.
OPERATIONS = (
    "coverage",
    "diversity",
    "merge",
    "received_attention",
    "reconstruction",
    "selection",
    "slot_attention",
)


def modules() -> dict[str, Path]:
    """Every module of the product and the benchmarks, by its dotted name."""
    found = {}
    for base, folder in BASES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            names = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((base, *names))] = path
    return found


def imported(source: str, known: set[str]) -> set[str]:
    """What a module imports of ours, wherever it says so: in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in known else str(node.module))
    return found & known


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, by any way round: one list for each such company."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    closure = {name: reached(name) for name in graph}
    companies = {
        tuple(sorted({name, *(other for other in closure[name] if name in closure[other])}))
        for name in graph
        if name in closure[name]
    }
    return [list(company) for company in sorted(companies)]


def layer(module: str) -> tuple[int, str]:
    """Height of a module's layer, and the layer's name."""
    rows = [(len(name), height, name) for height, row in enumerate(LAYERS) for name in row]
    found = max(row for row in rows if module == row[2] or module.startswith(row[2] + "."))
    return found[1], found[2]


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a higher layer, or of another one at the same height."""
    found = []
    for module, targets in graph.items():
        height, name = layer(module)
        for target in sorted(targets):
            other, of = layer(target)
            if other > height or (other == height and of != name):
                found.append(f"{module} ({name}) imports {target} ({of})")
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    found = modules()
    return {name: imported(path.read_text(), set(found)) for name, path in found.items()}


def test_no_two_modules_import_each_other(graph: dict[str, set[str]]) -> None:
    assert circles(graph) == []


def test_no_folder_imports_one_above_it(graph: dict[str, set[str]]) -> None:
    assert upward(graph) == []


def test_operations_know_nothing_of_each_other(graph: dict[str, set[str]]) -> None:
    folders = {name: f"ocvtp_kernels.{name}" for name in OPERATIONS}
    on_disk = {path.parent.name for path in (BASES["ocvtp_kernels"]).glob("*/__init__.py")}
    assert on_disk == set(OPERATIONS)
    for module, targets in graph.items():
        of = next((name for name, folder in folders.items() if f"{module}.".startswith(f"{folder}.")), None)
        if of is None:
            continue
        others = [t for t in targets for name in OPERATIONS if name != of and t.startswith(folders[name])]
        assert others == [], module


def test_every_layer_exists(graph: dict[str, set[str]]) -> None:
    for row in LAYERS:
        for name in row:
            assert name in graph
    assert "ocvtp" in graph["bench.pruner"]  # the walk sees something


def test_what_is_wrong_is_found() -> None:
    known = {"ocvtp.pruner", "ocvtp.pruner.hub", "ocvtp.vlm.call.calls"}
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from ocvtp.vlm.call.calls import forward
def later():
    from ocvtp.pruner import hub, OCPruner
"""
    assert imported(source, known) == {"ocvtp.vlm.call.calls", "ocvtp.pruner", "ocvtp.pruner.hub"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]
    found = upward({"ocvtp.pruner.hub": {"ocvtp.vlm.call.calls"}, "ocvtp.methods": {"ocvtp.metrics"}})
    assert [line.split()[0] for line in found] == ["ocvtp.pruner.hub", "ocvtp.methods"]
