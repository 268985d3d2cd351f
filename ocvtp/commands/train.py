"""``ocvtp train``: a pruner from features."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ocvtp.commands.errors import UserError, blamed_on_input
from ocvtp.commands.features import load_encoder
from ocvtp.commands.loading import resolve_device
from ocvtp.commands.progress import busy, steps

if TYPE_CHECKING:
    from rich.console import Console

    from ocvtp.training.source import FeatureSource
    from ocvtp.training.trainer import Trained

_PARTS = ("recipe", "pruner")


def run(
    out: Path,
    *,
    features: Path | None,
    validation_features: Path | None,
    images: Path | None,
    encoder: str | None,
    layer: int,
    crops: int,
    config: Path | None,
    recipe_flags: Mapping[str, Any],
    fresh: bool,
    device: str,
    dtype: str,
    workers: int,
    log_every: int,
    save_every: int,
    console: Console,
) -> Trained:
    """Check, train, say what came of it. Flags win over the config file."""
    _check_source(features, images, encoder)
    settings = read_config(config)
    from ocvtp.pruner.config import PrunerConfig
    from ocvtp.training.recipe import Recipe

    with blamed_on_input(ValueError):
        recipe = Recipe.from_dict({**settings["recipe"], **recipe_flags})
        PrunerConfig.from_dict(settings["pruner"])  # before anything is loaded
    on = None if device == "auto" else resolve_device(device)
    with blamed_on_input(ValueError):
        from ocvtp.training.team import Team

        team = Team(on)
    console.quiet = console.quiet or not team.main

    from ocvtp.training.store import FeatureStore
    from ocvtp.training.trainer import TrainingError, default_config, train

    source: FeatureSource
    with blamed_on_input(ValueError):
        if features is not None:
            source = FeatureStore(features)
        else:
            assert images is not None
            assert encoder is not None
            source = _fresh(images, encoder, layer, crops, str(team.device), dtype, console)
            workers = 0  # the encoder lives in this process
        validation = None if validation_features is None else FeatureStore(validation_features)
        sizes = default_config(source, **settings["pruner"])
    with blamed_on_input(ValueError, TrainingError), contextlib.ExitStack() as stack:
        step: Callable[[str], None] | None = None

        def progress(done: int, total: int, said: str) -> None:
            nonlocal step
            if step is None:
                step = stack.enter_context(steps(console, "training", total - done))
            step(f"step {done + 1} of {total}, {said or 'starting'}")

        trained = train(
            source,
            out,
            recipe,
            sizes,
            validation=validation,
            device=on,
            fresh=fresh,
            workers=workers,
            log_every=log_every,
            save_every=save_every,
            progress=progress,
            say=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )
    _say(trained, out, console)
    return trained


def read_config(path: Path | None) -> dict[str, dict[str, Any]]:
    """The ``recipe`` and ``pruner`` parts of a JSON file; empty without one.

    Raises:
        UserError: not a JSON file of these two parts.
    """
    if path is None:
        return {part: {} for part in _PARTS}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path} can't be read as JSON: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(part, dict) for part in values.values()):
        raise UserError(f'--config {path} must be an object with "recipe" and "pruner", both objects')
    if unknown := sorted(set(values) - set(_PARTS)):
        raise UserError(f"--config {path} has unknown part(s) {unknown}; there are: {', '.join(_PARTS)}")
    return {part: values.get(part, {}) for part in _PARTS}


def read_slots(given: str | None) -> list[int] | None:
    """``"16,32"`` as numbers.

    Raises:
        UserError: something else.
    """
    if given is None:
        return None
    try:
        return [int(part) for part in given.split(",")]
    except ValueError as error:
        raise UserError(
            f"--slots takes numbers with commas between them, as 16,32,64; got {given}"
        ) from error


def _check_source(features: Path | None, images: Path | None, encoder: str | None) -> None:
    if (features is None) == (images is None):
        raise UserError("give either --features (made by ocvtp features), or --images with --encoder")
    if images is not None and encoder is None:
        raise UserError("--images needs --encoder: what makes features of them")
    if features is not None and encoder is not None:
        raise UserError("--features are made already: leave --encoder out")


def _fresh(
    images: Path, encoder: str, layer: int, crops: int, device: str, dtype: str, console: Console
) -> FeatureSource:
    from ocvtp.images import find_images
    from ocvtp.training.features import ImageFeatures

    find_images(images)
    made = load_encoder(encoder, layer, device, dtype, console)
    with busy(console, f"looking at {images}"):
        return ImageFeatures(images, made, crops)


def _say(trained: Trained, out: Path, console: Console) -> None:
    if trained.resumed and trained.resumed == trained.steps:
        console.print(f"this run was finished before, after {trained.steps} steps")
    elif trained.resumed:
        console.print(f"went on from step {trained.resumed}")
    reason = "stopped early" if trained.finished == "early" else "all epochs done"
    console.print(
        f"{reason}: {trained.steps} steps, best validation loss {trained.best_loss:.4f} in epoch "
        f"{trained.best_epoch}"
    )
    console.print(f"pruner in {trained.pruner}; metrics and plot in {out}", soft_wrap=True)
