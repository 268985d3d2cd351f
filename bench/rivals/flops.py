"""Operations of published models under every rival method: ``python -m bench.rivals.flops [--write]``.

What :mod:`bench.flops` is to the pruner. A method inside the language model is fitted to the budget by what
goes into the layers on average, so that one budget means one thing; where it can't be had, the row says why.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, get_args

from bench import snapshot
from bench.flops import command
from ocvtp.cost.flops import counting
from ocvtp.cost.published import PUBLISHED
from ocvtp.methods.in_llm import Inside
from ocvtp.vlm.contracts.selector import DEFAULT_RULE
from ocvtp.vlm.rivals.catalog import METHODS

PATH = snapshot.FOLDER / "flops_rivals.json"
TEXT_TOKENS = 32
#: Model -> budgets that papers compare at: tokens, or shares of them.
BUDGETS: dict[str, Sequence[float]] = {
    "llava-1.5-7b": (192, 128, 64),
    "llava-next-7b": (640, 320, 160),
    "qwen2.5-vl-7b": (0.333, 0.222, 0.111),
}
#: What LLaVA-NeXT packs of four tiles and the whole picture, 48 newlines too: the pool of a method inside.
_NEXT_POOL = 2928


def methods_of(family: str) -> dict[str, Any]:
    """Name -> what is counted, of all methods that work on a family; ours as it comes first."""
    before = {
        name: kind("language_model") if kind.reads_text else kind()  # type: ignore[call-arg]
        for name, kind in METHODS.items()
        if family in kind.families
    }
    return {"ocvtp, default": DEFAULT_RULE, **before, **{name: name for name in get_args(Inside)}}


def counted(model: str, names: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Rows of a model by name; those of ``names`` alone."""
    one = PUBLISHED[model]
    config = one.config()
    rows: dict[str, dict[str, Any]] = {}
    with counting(config, TEXT_TOKENS, one.image) as count:
        for name, method in methods_of(config.model_type).items():
            if names is not None and name not in names:
                continue
            for keep in BUDGETS[model]:
                row: dict[str, Any] = {"model": model, "method": name, "keep": keep}
                try:
                    cost = count(method, _as_asked(model, name, keep))
                except ValueError as error:
                    rows[_name(row)] = {**row, "cannot": str(error)}
                    continue
                rows[_name(row)] = {
                    **row,
                    "average": round(cost.average, 1),
                    "unpruned_tflops": cost.unpruned.first_token / 1e12,
                    "tflops": cost.pruned.tflops(),
                }
    return rows


def _as_asked(model: str, name: str, keep: float) -> float:
    """A method inside takes shares of pictures that differ in size; the pool is what the model packs."""
    return keep / _NEXT_POOL if name in get_args(Inside) and model == "llava-next-7b" else keep


def _name(row: dict[str, Any]) -> str:
    return f"{row['model']}, {row['method']}, keep {row['keep']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Count all, compare or write; the exit code."""

    def rows() -> dict[str, dict[str, Any]]:
        return {name: row for model in BUDGETS for name, row in counted(model).items()}

    return command("bench.rivals.flops", str(__doc__), PATH, rows, argv)


if __name__ == "__main__":
    sys.exit(main())
