"""Tables in Markdown, and the places for them in documents."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left and all numbers to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def replace_blocks(text: str, blocks: dict[str, str]) -> str:
    """``text`` with what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` replaced, for each block.

    Raises:
        ValueError: a block that the text has no place for.
    """
    for name, block in blocks.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"no place for {name!r}: the document needs {start} and {end}")
        text = f"{before}{start}\n\n{block}\n\n{end}{after}"
    return text
