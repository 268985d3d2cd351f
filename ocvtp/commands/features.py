"""``ocvtp features``: what a pruner is trained on, from a folder of images."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ocvtp.commands.errors import UserError, blamed_on_input
from ocvtp.commands.loading import encoder_source, resolve_device, resolve_dtype
from ocvtp.commands.progress import busy, share, steps

if TYPE_CHECKING:
    from rich.console import Console

    from ocvtp.training.source import Encoder

_SHOWN = 10  # bad images named one by one


def run(
    folder: Path,
    *,
    encoder: str,
    layer: int,
    out: Path,
    crops: int,
    batch: int,
    shard_mb: int,
    limit: int | None,
    device: str,
    dtype: str,
    side: int | None,
    console: Console,
) -> None:
    """Extract, and say what was made and what was skipped."""
    from ocvtp.images import BadImageError, NoImagesError, find_images
    from ocvtp.training.encoder import EncoderError
    from ocvtp.training.features import extract
    from ocvtp.training.store import Index, StoreError, check_shards

    mistakes = (BadImageError, NoImagesError, EncoderError, StoreError, OSError)
    with blamed_on_input(*mistakes):
        files = find_images(folder)[:limit]
        begun = Index.begun(out)
        if begun is not None and begun.shards:
            with share(console, "checking what is stored") as show:
                check_shards(out, begun.shards, show)
    made = load_encoder(encoder, layer, device, dtype, console, side)
    start = time.perf_counter()

    def rate(records: int) -> str:
        return f"{records / (time.perf_counter() - start):.1f} a second"

    with blamed_on_input(*mistakes), steps(console, "features", len(files)) as step:
        result = extract(
            folder,
            made,
            out,
            crops=crops,
            batch=batch,
            shard_bytes=shard_mb * 10**6,
            limit=limit,
            verify=False,
            progress=lambda done, total, new: step(f"{total} images, {rate(new)}"),
        )
    if result.new:
        console.print(f"{result.new} new records at {rate(result.new)}, {result.total} in {out}")
    else:
        console.print(f"nothing to do: {out} holds all {result.total} records")
    if result.duplicates:
        console.print(f"{result.duplicates} files have the content of another and were left out")
    if result.bad:
        console.print(f"{len(result.bad)} files were skipped (all of them in {out / 'index.json'}):")
        for reason in list(result.bad.values())[:_SHOWN]:
            console.print(f"  {reason}", markup=False, highlight=False, soft_wrap=True)
        if len(result.bad) > _SHOWN:
            console.print(f"  and {len(result.bad) - _SHOWN} more")


def load_encoder(
    source: str, layer: int, device: str, dtype: str, console: Console, side: int | None = None
) -> Encoder:
    """The encoder, from what a person typed."""
    from ocvtp.training.encoder import EncoderError, FeatureEncoder, vision_config
    from ocvtp.training.pictures import PictureEncoder, is_pruned_family

    encoder_source(source)
    on = resolve_device(device)
    as_dtype = resolve_dtype(dtype, on)
    with blamed_on_input(EncoderError):
        pictures = is_pruned_family(source)
        if side is not None and not pictures:
            raise UserError(f"--side is for models that see pictures of any size; {source} tells its own")
        if not pictures:
            depth = vision_config(source).num_hidden_layers
            if not 0 <= layer < depth:
                raise UserError(
                    f"--layer must be between 0 and {depth - 1}: {source} has {depth}; got {layer}"
                )
        # transformers draws bars of its own while it downloads
        waiting = busy(console, f"loading {source}") if os.path.isdir(source) else contextlib.nullcontext()
        made: Encoder
        with waiting:
            if pictures:
                made = PictureEncoder(source, layer, on, as_dtype, side)
            else:
                made = FeatureEncoder(source, layer, on, as_dtype)
    if made.note:
        console.print(made.note, markup=False, highlight=False, soft_wrap=True)
    return made
