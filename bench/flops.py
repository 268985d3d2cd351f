"""Operations of published models, against what was counted before: ``python -m bench.flops [--write]``.

They depend on no machine: a difference is a change of the code or of a library. Exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import snapshot
from bench.harness import provenance
from ocvtp.cost.flops import count
from ocvtp.cost.published import PUBLISHED

PATH = snapshot.FOLDER / "flops.json"
TEXT_TOKENS = 32
_LLAVA = (32, 64, 128, 192, 288, 576)
#: Model -> budgets. Qwen's are those of HiPrune's tables (arXiv 2508.00553), and half and all.
BUDGETS: dict[str, Sequence[float]] = {
    "llava-1.5-7b": _LLAVA,
    "llava-1.5-13b": _LLAVA,
    "llava-next-7b": (64, 160, 320, 640, 1440, 2880),
    "qwen2.5-vl-3b": (0.112, 0.223, 0.334, 0.5, 1.0),
    "qwen2.5-vl-7b": (0.112, 0.223, 0.334, 0.5, 1.0),
}


def counted(model: str, keep: float) -> dict[str, Any]:
    """One row."""
    one = PUBLISHED[model]
    return count(one.config(), keep, TEXT_TOKENS, one.image).to_dict()


def name_of(model: str, row: dict[str, Any]) -> str:
    """Of a row in the snapshot."""
    return f"{model}, keep {row['keep']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Count all, compare or write; the exit code."""

    def rows() -> dict[str, dict[str, Any]]:
        return {
            name_of(model, row): {"model": model, **row}
            for model, budgets in BUDGETS.items()
            for row in (counted(model, keep) for keep in budgets)
        }

    return command("bench.flops", str(__doc__), PATH, rows, argv)


def command(
    module: str,
    description: str,
    path: Path,
    rows: Callable[[], dict[str, dict[str, Any]]],
    argv: Sequence[str] | None,
) -> int:
    """Count, and compare with what was accepted, or accept it; the exit code.

    Args:
        module: that is run.
        description: of it.
        path: of the snapshot, if the command line says no other.
        rows: makes the counts, by name.
        argv: of the command.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--write", action="store_true", help="accept what was counted: renew the snapshot")
    parser.add_argument("--path", type=Path, default=path)
    arguments = parser.parse_args(argv)
    made = rows()
    if arguments.write:
        head = {name: provenance()[name] for name in ("date", "commit", "torch", "transformers")}
        snapshot.write(arguments.path, {**head, "models": made}, 2)
        print(f"{len(made)} counts written to {arguments.path.name}")
        return 0
    found = snapshot.changes(snapshot.read(arguments.path).get("models", {}), made, whole=True)
    print(*found or [f"{len(made)} counts are those accepted"], sep="\n")
    if found:
        print(f"if that is meant: python -m {module} --write")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
