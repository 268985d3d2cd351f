"""Which document has which blocks, and the check that no other figure is in it."""

from __future__ import annotations

import re
from pathlib import Path

from bench.accuracy.report import tables as accuracy_tables
from bench.evidence.report import tables as evidence_tables
from bench.evidence.rows import Row
from bench.markdown import replace_blocks
from bench.report import accuracy, kernels, models, predicted, resources, serving
from bench.report.pictures import PICTURES, draw, is_current
from bench.report.results import Results
from bench.rivals import support

ROOT = Path(__file__).parents[2]
_PERFORMANCE: dict[str, kernels.Block] = {
    "targets": kernels.targets,
    "predicted": predicted.totals_table,
    "e2e": models.end_to_end,
    "stages": models.stages,
    "by-method": models.by_method,
    "flops": models.flops,
    "scaling": models.scaling,
    "limits": models.limits,
    "serving": serving.served,
    "kernels-floors": kernels.floors,
    "results": kernels.files,
}
#: Documents that have no figure outside of their blocks.
CHECKED = ("README.md", "docs/performance.md")
#: What looks like a figure and is none of ours: a setting, or what others print.
ALLOWED = (
    "5 % of the tokens",  # a budget
    "more than 95 % of it at 11 % of the tokens",  # the authors' claim, named as theirs
)
_UNITS = "ms|µs|us|s|x|×|%|kB|MB|GB|GiB|[GMT]FLOPs?|TFLOP/s|GB/s|tokens/s|points"
_FIGURE = re.compile(rf"(?<![\w.])[\d][\d.,]*\s?(?:{_UNITS})(?![\w/])")


def blocks(results: Results) -> dict[str, dict[str, str]]:
    """Document -> block -> Markdown."""
    found = {
        "README.md": {"headline": models.headline(results), "answers": accuracy.answers(results)},
        "docs/performance.md": {name: block(results) for name, block in _PERFORMANCE.items()},
    }
    found["docs/kernels.md"] = {
        "resources": resources.needed(),
        "predicted-launches": predicted.latest_tables(results),
    }
    found["docs/methods.md"] = support.blocks()
    record, evidence = results.one("accuracy"), results.one("evidence")
    if record is not None:
        found["docs/accuracy.md"] = accuracy_tables(record.data)
    if evidence is not None:
        rows = [Row(**row) for row in evidence.data["rows"]]
        found["docs/evidence.md"] = evidence_tables(rows, evidence.data["remedied"])
    return found


def renew(results: Results, root: Path = ROOT) -> None:
    """Put blocks into their documents, and draw the pictures."""
    for name, of in blocks(results).items():
        path = root / name
        path.write_text(replace_blocks(path.read_text(encoding="utf-8"), of), encoding="utf-8")
    for picture in PICTURES:
        draw(picture, results, root / "docs")


def faults(results: Results, root: Path = ROOT) -> list[str]:
    """A line for each block or picture that is not what the results make, and each figure typed by hand."""
    found = []
    for name, of in blocks(results).items():
        text = (root / name).read_text(encoding="utf-8")
        for block, markdown in of.items():
            if replace_blocks(text, {block: markdown}) != text:
                found.append(f"{name}: block {block!r} is not what the results make")
    found += [
        f"docs/{name} was drawn from other results"
        for name in PICTURES
        if not is_current(name, results, root / "docs")
    ]
    for name in CHECKED:
        typed = typed_by_hand((root / name).read_text(encoding="utf-8"))
        found += [f"{name}: {figure!r} is in no block" for figure in typed]
    return found


def typed_by_hand(text: str, allowed: tuple[str, ...] = ALLOWED) -> list[str]:
    """Numbers with a unit outside of blocks and code, each with what is around it."""
    text = re.sub(r"<!-- ([\w-]+) -->.*?<!-- /\1 -->", " ", text, flags=re.DOTALL)
    text = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    text = " ".join(re.sub(r"`[^`]*`", "`code`", text).split())
    for phrase in allowed:
        text = text.replace(phrase, " ")
    return [text[max(0, m.start() - 30) : m.end() + 10].strip() for m in _FIGURE.finditer(text)]
