"""A package's imports of itself, made relative: a hub's kernel is loaded under a name that is not its own."""

from __future__ import annotations

import ast


class AbsoluteImportError(ValueError):
    """An import of the package by name that can't be made relative."""


def relative(source: str, package: str, inside: tuple[str, ...]) -> str:
    """``source`` with ``from package.x import y`` as ``from ..x import y``, and nothing else changed.

    Args:
        source: of a module of ``package``.
        package: its name at the top.
        inside: folders below ``package`` in which the module lies; a folder's ``__init__`` lies in it.

    Raises:
        AbsoluteImportError: ``import package``, which has no relative form, or two statements on a line.
    """
    lines = source.splitlines(keepends=True)
    dots = "." * (len(inside) + 1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(_top(alias.name) == package for alias in node.names):
            raise AbsoluteImportError(f"line {node.lineno}: say from {package} import ..., not import")
        if not isinstance(node, ast.ImportFrom) or node.level or _top(node.module or "") != package:
            continue
        line = lines[node.lineno - 1]
        indent = len(line) - len(line.lstrip())
        written = f"from {node.module} import "
        if node.col_offset != indent or not line[indent:].startswith(written):
            raise AbsoluteImportError(f"line {node.lineno}: an import has to be a line of its own")
        target = dots + str(node.module)[len(package) + 1 :]
        lines[node.lineno - 1] = f"{line[:indent]}from {target} import {line[indent + len(written) :]}"
    return "".join(lines)


def _top(module: str) -> str:
    return module.partition(".")[0]
