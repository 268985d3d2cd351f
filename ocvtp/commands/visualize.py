"""``ocvtp visualize``: what is kept of a photograph, as a picture (the paper's Figure 4)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ocvtp.commands.dropped import Wishes
from ocvtp.commands.errors import UserError, blamed_on_input
from ocvtp.commands.loading import is_rule, prepare
from ocvtp.commands.output import check_writable
from ocvtp.commands.progress import busy

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from ocvtp import PruneReport


def run(
    image: Path,
    *,
    model: str,
    pruner: str,
    keep: float,
    out: Path,
    device: str,
    dtype: str,
    layer: int | None,
    seed: int,
    refine: int,
    wishes: Wishes,
    console: Console,
) -> None:
    """Load, select, draw, write ``out``."""
    check_writable(out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out must end in .png; got {out}")
    rule = is_rule(pruner)

    def planned(report: PruneReport) -> None:
        if report.tokens_before is None:
            raise UserError(
                "overlays can be drawn for models whose images all have one size; this is a "
                f"{report.family!r}"
            )
        if report.own_merge:
            raise UserError(
                f"{pruner!r} makes rows by a rule of its own, some of no token's, which can't be drawn; one "
                "that only chooses can, with --merge projected"
            )
        if rule and report.merge == "off" and not report.weigh:
            raise UserError(
                f"{pruner!r} has no slots to draw; give a pruner, or --merge projected to draw for which "
                "patches the kept ones stand"
            )

    ready = prepare(
        image,
        model=model,
        pruner=pruner,
        keep=keep,
        device=device,
        dtype=dtype,
        layer=layer,
        seed=seed,
        refine=refine,
        wishes=wishes,
        console=console,
        planned=planned,
    )
    image_processor = ready.processor.image_processor
    pixels = image_processor(images=ready.picture, return_tensors="pt")["pixel_values"]
    with busy(console, "selecting"):
        drawn = draw(ready.model, pixels, image_processor, slots=not rule)
    with blamed_on_input(OSError):
        drawn.save(out)


def draw(
    model: Any,
    pixel_values: torch.Tensor,
    image_processor: Any,
    note: str | None = None,
    *,
    slots: bool = True,
) -> Image:
    """The overlay of one image on a patched model; also who stands for whom, if kept tokens stand for others.

    Args:
        model: patched by ``ocvtp.apply``.
        pixel_values: ``[1, 3, H, W]`` from ``image_processor``, on any device.
        image_processor: knows how to undo its normalisation.
        note: a line under the legend.
        slots: whether a pruner chooses, whose slots are drawn; rules have none.
    """
    from ocvtp.visualize import overlay, unnormalize
    from ocvtp.vlm import select
    from ocvtp.vlm.call.controller import controller_of

    selection = select(model, pixel_values.to(model.device, model.dtype), return_attention=slots)
    attention, owner = selection.slot_attention, selection.owner
    side = model.config.vision_config.patch_size * controller_of(model).adapter.facts({}).unit
    seen = unnormalize(
        pixel_values[0].cpu().numpy(),
        image_processor.image_mean,
        image_processor.image_std,
        image_processor.rescale_factor,
    )
    return overlay(
        seen,
        selection.indices[0].cpu().numpy(),
        None if attention is None else attention[0].float().cpu().numpy(),
        (pixel_values.shape[2] // side, pixel_values.shape[3] // side),
        owner=None if owner is None else owner[0].cpu().numpy(),
        note=note,
    )
