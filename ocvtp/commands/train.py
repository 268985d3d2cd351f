"""``ocvtp train``: a pruner from features."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ocvtp.commands.errors import UserError, blamed_on_input
from ocvtp.commands.features import load_encoder
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
    from ocvtp.config import PrunerConfig
    from ocvtp.training.recipe import Recipe

    with blamed_on_input(ValueError):
        recipe = Recipe.from_dict({**settings["recipe"], **recipe_flags})
        PrunerConfig.from_dict(settings["pruner"])  # before anything is loaded
    _require_accelerate()
    from accelerate import PartialState

    from ocvtp.training.store import FeatureStore
    from ocvtp.training.trainer import DivergedError, default_config, train

    console.quiet = console.quiet or not PartialState(cpu=device == "cpu").is_main_process
    source: FeatureSource
    with blamed_on_input(ValueError):
        if device not in ("auto", "cpu"):
            raise UserError(f"--device is auto or cpu here; accelerate launch chooses GPUs. Got {device}")
        if features is not None:
            source = FeatureStore(features)
        else:
            assert images is not None
            assert encoder is not None
            source = _fresh(images, encoder, layer, crops, device, dtype, console)
            workers = 0  # the encoder lives in this process
        validation = None if validation_features is None else FeatureStore(validation_features)
        sizes = default_config(source, **settings["pruner"])
    with blamed_on_input(ValueError, DivergedError), steps(console, "training", recipe.epochs) as step:
        shown = -1

        def progress(done: int, total: int, said: str) -> None:
            nonlocal shown
            epoch = done * recipe.epochs // total
            if epoch != shown:
                shown = epoch
                step(f"epoch {epoch + 1}, {said or 'starting'}")

        trained = train(
            source,
            out,
            recipe,
            sizes,
            validation=validation,
            cpu=device == "cpu",
            workers=workers,
            log_every=log_every,
            save_every=save_every,
            progress=progress,
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


def _require_accelerate() -> None:
    import importlib.util

    if importlib.util.find_spec("accelerate") is None:
        raise UserError("training needs accelerate: pip install 'ocvtp[train]'")


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
