"""A block about what compiled kernels of Slot Attention need, from bench/results/counts/aot.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bench import aot_snapshot, snapshot
from bench.markdown import table

_KERNELS = ("attend", "attend_backward", "gru", "linear", "slot_loop", "update")
# Of linear, by the constants that are true.
_ROLES = (
    (("NORM", "COLUMN"), "queries"),
    (("NORM", "GELU"), "mlp-1"),
    (("RESIDUAL",), "mlp-2"),
    (("GELU",), "encode-1"),
    ((), "encode-2"),
)
_TYPES = ("fp16", "bf16", "fp32")


def needed() -> str:
    """Registers of a thread and KB of shared memory of a program, the most of a row's variants."""
    rows: dict[tuple[str, str], dict[str, tuple[int, int]]] = {}
    targets = snapshot.read(aot_snapshot.PATH)["targets"]
    for target, found in targets.items():
        for key, row in found.items():
            named = _named(key)
            if named is not None:
                cell = rows.setdefault(named, {})
                most = cell.get(target, (0, 0))
                cell[target] = max(most[0], row["registers"]), max(most[1], row["shared"])
    order = sorted(rows, key=lambda named: (_TYPES.index(named[1]), named[0]))
    lines = [
        [name, dtype, *(_cell(rows[name, dtype].get(target)) for target in targets)] for name, dtype in order
    ]
    return table(["kernel", "op", *targets], lines)


def _cell(found: tuple[int, int] | None) -> str:
    return "-" if found is None else f"{found[0]} / {found[1] / 1024:.0f}"


def _named(key: str) -> tuple[str, str] | None:
    """Name and dtype of a row for a launch's key; ``None`` if none is for it."""
    kernel, dtype = key.split()[:2]
    given: Mapping[str, Any] = dict(re.findall(r"(\w+)=(\S+)", key))
    if kernel not in _KERNELS or given.get("PRECISION") == "tf32" or dtype not in _TYPES:
        return None
    on = {name for name, value in given.items() if value == "True"}
    if kernel in ("attend", "attend_backward"):
        chunks = " chunks" * ("ONE" not in on)
        return f"{kernel}{' last' * ('LAST' in on)}{chunks} BK={given['BK']}", dtype
    if kernel == "gru":
        return f"gru {'first' if 'GIVEN' in on else 'later'} {given['BM']}x{given['BJ']}", dtype
    if kernel == "linear":
        role = next(role for needs, role in _ROLES if on.issuperset(needs))
        return f"linear {role} {given['BM']}x{given['BO']}", dtype
    if kernel == "slot_loop":
        return f"slot_loop BJ={given['BJ']}", dtype
    return f"update BD={given['BD']}", dtype
