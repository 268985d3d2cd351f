"""What every compiled kernel needs, against what was accepted: ``bench/results/counts/aot.json``.

Another Triton brings another compiler, which allots registers otherwise, so only the version that made the
snapshot is held to it. A row also says which program it is of: whatever is still that program needs what it
needed then, and need not be compiled to know.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import snapshot
from bench.launches import kinds_of
from ocvtp_kernels._launch import Launch

PATH = snapshot.FOLDER / "aot.json"
ACCEPT = "If that is meant, python -m bench.aot --write accepts it."

#: Target -> key of a kernel -> what it needs.
Rows = dict[str, dict[str, snapshot.Row]]


#: Programs whose name ends so, one in sixteen, are compiled again although they are as they were.
_DOUBTED = "0"


class MixedVersionsError(RuntimeError):
    """A part of a snapshot can't be renewed with another Triton than made the rest of it."""


def keys(launches: Sequence[Launch], names: Sequence[str]) -> list[str]:
    """``names`` of ``launches``, with what tells apart those of the same name: ``"gather ... [x_c=1]"``.

    Raises:
        ValueError: two launches that nothing tells apart.
    """
    alike: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        alike[name].append(index)
    result = list(names)
    for indices in alike.values():
        if len(indices) == 1:
            continue
        kinds = [kinds_of(launches[index]) for index in indices]
        differing = [name for name in kinds[0] if len({kind[name] for kind in kinds}) > 1]
        for index, kind in zip(indices, kinds, strict=True):
            result[index] += f" [{' '.join(f'{name}={kind[name]}' for name in differing)}]"
    if len(set(result)) < len(result):
        raise ValueError(f"two launches have one name: {sorted({k for k in result if result.count(k) > 1})}")
    return result


def trusted(version: str, path: Path) -> Rows:
    """Accepted rows that hold for whatever is the same program; none where another Triton made them."""
    accepted = snapshot.read(path)
    if accepted.get("triton") != version:
        return {}
    return {
        target: {key: row for key, row in rows.items() if not row["program"].endswith(_DOUBTED)}
        for target, rows in accepted["targets"].items()
    }


def compare(
    found: Mapping[str, Mapping[str, snapshot.Row]], *, version: str, whole: bool, path: Path
) -> tuple[list[str], bool]:
    """Lines to print, and whether what was compiled is what was accepted.

    Args:
        found: row by key and target.
        version: of the Triton that compiled.
        whole: whether each target was compiled completely.
        path: of the snapshot.
    """
    accepted = snapshot.read(path)
    if not accepted:
        return [f"there is no {path.name}. python -m bench.aot --write makes it"], False
    if version != accepted["triton"]:
        return [f"{path.name} is of triton {accepted['triton']}, this is {version}: not compared"], True
    lines = []
    for target, rows in found.items():
        old = accepted["targets"].get(target, {})
        changes = snapshot.changes(_numbers(old), _numbers(rows), whole=whole)
        lines += [f"{target} {line}" for line in changes]
    if lines:
        return [*lines, f"{len(lines)} differences to {path.name}. {ACCEPT}"], False
    others = sum(
        row["program"] != accepted["targets"][target][key]["program"]
        for target, rows in found.items()
        for key, row in rows.items()
    )
    if others:
        lines = [f"{others} are other programs than {path.name} is of: --write lets --changed leave them out"]
    return [*lines, f"all as in {path.name}"], True


def _numbers(rows: Mapping[str, snapshot.Row]) -> dict[str, snapshot.Row]:
    """What is counted, whatever program it is of."""
    return {
        key: {name: value for name, value in row.items() if name != "program"} for key, row in rows.items()
    }


def renew(
    found: Mapping[str, Mapping[str, snapshot.Row]],
    *,
    version: str,
    commit: object,
    kernels: Collection[str] = (),
    order: Iterable[str] = (),
    path: Path,
) -> None:
    """Replace what was compiled, and nothing else.

    Args:
        found: row by key and target.
        version: of the Triton that compiled.
        commit: that was compiled.
        kernels: those that were compiled, if not all.
        order: of targets in the file.
        path: of the snapshot.

    Raises:
        MixedVersionsError: the rest of the snapshot is of another Triton.
    """
    accepted = snapshot.read(path)
    targets: dict[str, dict[str, Any]] = accepted.get("targets", {})
    all_of_it = set(targets) <= set(found) and not kernels
    if targets and accepted["triton"] != version and not all_of_it:
        raise MixedVersionsError(
            f"{path.name} is of triton {accepted['triton']}, this is {version}: renew all of it, "
            "without --target and --kernel"
        )
    for target, rows in found.items():
        kept = {key: row for key, row in targets.get(target, {}).items() if key.split()[0] not in kernels}
        targets[target] = {**kept, **rows} if kernels else dict(rows)
    ranks = {target: rank for rank, target in enumerate(order)}
    ordered = sorted(targets, key=lambda target: ranks.get(target, len(ranks)))
    record = {
        "triton": version,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit,
        "targets": {target: dict(sorted(targets[target].items())) for target in ordered},
    }
    snapshot.write(path, record, depth=3)
