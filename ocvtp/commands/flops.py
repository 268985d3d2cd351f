"""``ocvtp flops``: what each part of a model costs, unpruned and pruned, without its weights."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, Group
from rich.table import Table

from ocvtp.commands.dropped import Wishes
from ocvtp.commands.errors import UserError, blamed_on_input
from ocvtp.commands.loading import check_keep, model_source, read_model_config

if TYPE_CHECKING:
    from ocvtp.cost.flops import Cost

Accounting = Literal["both", "paper", "full"]
PARTS = {
    "vision_tower": "vision tower",
    "pruner": "fill scores and pruner",
    "projector": "projector",
    "merging": "dropped tokens into kept ones",
    "prefill": "language model, prefill",
    "head": "head, one token",
    "first_token": "to the first token",
    "decode_step": "each further token",
}


def run(
    *,
    model: str,
    keep: float,
    text_tokens: int,
    image: str | None,
    wishes: Wishes,
    counter: Literal["torch", "fvcore"],
) -> dict[str, Any]:
    """Count; JSON-ready.

    Raises:
        UserError: a model that can't be counted, a budget or image that it can't have, or no fvcore.
    """
    check_keep(keep)
    if text_tokens < 1:
        raise UserError(f"--text-tokens must be at least 1; got {text_tokens}")
    size = None if image is None else read_size(image)
    config, default = _config(model)
    from ocvtp.cost.flops import count

    with blamed_on_input(ValueError, ImportError):
        shape = size or default
        cost: Cost = count(config, keep, text_tokens, shape, counter=counter, **wishes.options())
    return {"model": model, "counter": counter, **cost.to_dict()}


def read_size(image: str) -> tuple[int, int]:
    """``672x1008`` is a height and a width."""
    found = re.fullmatch(r"(\d+)x(\d+)", image)
    if found is None:
        raise UserError(f"--image must be HEIGHTxWIDTH in pixels, such as 672x1008; got {image!r}")
    return int(found[1]), int(found[2])


def _config(model: str) -> tuple[Any, tuple[int, int] | None]:
    """A configuration, and the image counted by default."""
    from ocvtp.cost.published import PUBLISHED

    if model in PUBLISHED:
        return PUBLISHED[model].config(), PUBLISHED[model].image
    if "/" not in model and not os.path.isdir(model):
        raise UserError(
            f"no folder {model!r} here; give a model's folder, Hub id, or one of {', '.join(PUBLISHED)}"
        )
    return read_model_config(model_source(model)), None


def show(found: dict[str, Any], accounting: Accounting, console: Console) -> None:
    """A table of parts, the paper's accounting, or both."""
    shown: list[Any] = []
    tokens = found["prompt_tokens"]
    head = ("TFLOP", f"unpruned, {tokens['unpruned']} tokens", f"pruned, {tokens['pruned']} tokens", "share")
    image = f"{found['keep']} of {found['image_tokens']} image tokens"
    dropped = {
        "off": "",
        "projected": ", merged after the projector",
        "features": ", merged before the projector",
    }
    title = f"{found['model']}: {image}{dropped[found['merge']]}, {found['text_tokens']} of text"
    if accounting != "paper":
        table = Table(*head, title=title)
        unpruned, pruned = found["full"]["unpruned"], found["full"]["pruned"]
        for part, name in PARTS.items():
            share = f"{pruned[part] / unpruned[part]:.1%}" if unpruned[part] else ""
            cells = (name, f"{unpruned[part]:.4f}", f"{pruned[part]:.4f}", share)
            table.add_row(*cells, style="bold" if part == "first_token" else None)
        shown.append(table)
    if accounting != "full":
        paper = found["paper"]
        table = Table("TFLOP", "unpruned", "pruned", "share", title="" if shown else title)
        table.add_row(
            "language model, by the paper's accounting",
            f"{paper['unpruned_tflops']:.2f}",
            f"{paper['pruned_tflops']:.2f}",
            f"{paper['ratio']:.1%}",
        )
        shown.append(table)
    if accounting == "paper":
        full = found["full"]
        before, after = (full[which]["first_token"] for which in ("unpruned", "pruned"))
        shown.append(
            "everything to the first token (tower, pruner, projector, merging, three FFN matrices, head): "
            f"{before:.2f} -> {after:.2f}, {full['ratio']:.1%}"
        )
    console.print(Group(*shown), highlight=False)
