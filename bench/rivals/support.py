"""Tables about rival methods, from the code that decides them: where each works, and what budgets mean."""

from __future__ import annotations

from typing import Any, get_args

from bench.markdown import table
from bench.rivals import flops
from bench.snapshot import read
from ocvtp.methods.in_llm import PRESETS, Inside, averages
from ocvtp.methods.in_llm.by_name import ADAPTATIONS
from ocvtp.methods.in_llm.presets import REFERENCES
from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.rivals.catalog import METHODS

#: Column -> model type, and whether the tower has a class token.
_COLUMNS = {
    "LLaVA-1.5": ("llava", True),
    "LLaVA-1.5 with SigLIP": ("llava", False),
    "LLaVA-NeXT": ("llava_next", True),
    "Qwen2.5-VL": ("qwen2_5_vl", False),
}


def blocks() -> dict[str, str]:
    """Name of a block of docs/methods.md -> Markdown."""
    return {"supported": supported(), "budgets": budgets(), "operations": operations()}


def supported() -> str:
    """Every method on every family: as published, our adaptation, or not at all."""
    notes: list[str] = []
    lines = []
    for name, kind in METHODS.items():
        cells = [_cell(kind, family, class_token, notes) for family, class_token in _COLUMNS.values()]
        lines.append([f"{kind.title} (`{name}`, {kind.source})", *cells])
    for inside in get_args(Inside):
        lines.append([f"`{inside}`, inside the language model", *_inside_cells(inside, notes)])
    legend = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    return f"{table(['method', *_COLUMNS], lines)}\n\n{legend}"


def _cell(kind: type[Reducer], family: str, class_token: bool, notes: list[str]) -> str:
    if family not in kind.families:
        return "no"
    if family != "qwen2_5_vl" and not class_token and kind.classless is None:
        return "no"
    return _noted(kind.note(family, class_token=class_token), notes)


def _inside_cells(name: Inside, notes: list[str]) -> list[str]:
    one = next(iter(PRESETS["llava-1.5-7b"][name].values()))[0].method  # settings say what is ours of them
    cells = []
    for family, _ in _COLUMNS.values():
        own = (one.adaptation or "") if family == "qwen2_5_vl" else ""
        cells.append(_noted(own or ADAPTATIONS.get(family, {}).get(name, ""), notes))
    return cells


def _noted(note: str, notes: list[str]) -> str:
    if not note:
        return "as published"
    if note not in notes:
        notes.append(note)
    return f"ours ({notes.index(note) + 1})"


def budgets() -> str:
    """Presets of methods inside the language model, and what each costs by every way of counting."""
    lines = []
    for model, methods in PRESETS.items():
        reference = REFERENCES[model]
        for name, by_budget in methods.items():
            for budget, presets in by_budget.items():
                for preset in presets:
                    tokens = reference.tokens or 1000
                    found = averages(preset.method, depth=reference.depth, tokens=tokens)
                    scale = 1 if reference.tokens else 0.1  # shares in per cent
                    unit = "" if reference.tokens else " %"
                    lines.append(
                        [
                            f"{model}, `{name}`",
                            f"{budget}" if reference.tokens else f"{100 * budget:.1f} %",
                            f"`{_said(preset.method)}`",
                            f"{found.entering * scale:.1f}{unit}",
                            f"{found.leaving * scale:.1f}{unit}",
                            " → ".join(f"{one * scale:.0f}" for one in found.nominal) + unit,
                            f"{preset.counted}; {preset.source}",
                        ]
                    )
    head = [
        "model, method",
        "budget",
        "settings",
        "go in, average",
        "come out, average",
        "behind cuts",
        "the budget counts; source",
    ]
    return table(head, lines)


def _said(method: Any) -> str:
    """Settings, briefly: what differs from one preset to the next."""
    names = {"FastV": ("layer", "keep"), "DART": ("layer", "keep"), "PyramidDrop": ("layers", "ratios")}
    fields = names.get(method.name, ("layers", "keep", "version"))
    said = ", ".join(f"{name}={_short(getattr(method, name))}" for name in fields)
    return f"{type(method).__name__}({said})"


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_short(one) for one in value)})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def operations() -> str:
    """TFLOP to the first token of published models under every method, at the budgets of the papers."""
    rows = list(read(flops.PATH).get("models", {}).values())
    budgets = flops.BUDGETS
    head = [""]
    for model, keeps in budgets.items():
        head += [f"{model}, {keep if keep > 1 else f'{100 * keep:.1f} %'}" for keep in keeps]
    found = {(row["model"], row["method"], row["keep"]): row for row in rows}
    lines = [["unpruned", *(_unpruned(rows, model) for model, keeps in budgets.items() for _ in keeps)]]
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = [_tflop(found.get((model, name, keep))) for model, keeps in budgets.items() for keep in keeps]
        lines.append([METHODS[name].title if name in METHODS else name, *cells])
    return table(head, lines)


def _unpruned(rows: list[dict[str, Any]], model: str) -> str:
    return f"{next(row['unpruned_tflops'] for row in rows if row['model'] == model and 'tflops' in row):.2f}"


def _tflop(row: dict[str, Any] | None) -> str:
    if row is None:
        return "no"
    return "can't" if "cannot" in row else f"{row['tflops']['first_token']:.2f}"
