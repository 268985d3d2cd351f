"""``ocvtp train``: a pruner from features."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ocvtp.commands.errors import UserError, blamed_on_input
from ocvtp.commands.features import load_encoder
from ocvtp.commands.loading import resolve_device
from ocvtp.commands.progress import busy, share, steps

if TYPE_CHECKING:
    from rich.console import Console

    from ocvtp.training.source import FeatureSource
    from ocvtp.training.team import Team
    from ocvtp.training.trainer import Trained


@dataclass(frozen=True)
class Settings:
    """What a ``--config`` file sets.

    Attributes:
        recipe: fields of :class:`~ocvtp.training.recipe.Recipe`.
        pruner: fields of :class:`~ocvtp.PrunerConfig`.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    pruner: dict[str, Any] = field(default_factory=dict)


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
    settings = read_config(config)  # before anything is loaded
    from ocvtp.training.recipe import Recipe

    with blamed_on_input(ValueError):
        recipe = Recipe.from_dict({**settings.recipe, **recipe_flags})
    on = None if device == "auto" else resolve_device(device)
    with blamed_on_input(ValueError):
        from ocvtp.training.team import Team

        team = Team(on)
    console.quiet = console.quiet or not team.main

    from ocvtp.training.trainer import TrainingError, default_config, train

    source: FeatureSource
    with blamed_on_input(ValueError, TrainingError, OSError):
        if features is not None:
            source = _stored(features, team, console)
        else:
            assert images is not None
            assert encoder is not None
            source = _fresh(images, encoder, layer, crops, str(team.device), dtype, console)
            workers = 0  # the encoder lives in this process
        validation = None if validation_features is None else _stored(validation_features, team, console)
        sizes = default_config(source, **settings.pruner)
    with blamed_on_input(ValueError, TrainingError, OSError), contextlib.ExitStack() as stack:
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


def read_config(path: Path | None) -> Settings:
    """What the JSON file sets, checked; nothing without one.

    Raises:
        UserError: not such a file, or a field that is unknown, of another type or out of bounds.
    """
    if path is None:
        return Settings()
    from ocvtp.pruner.config import PrunerConfig
    from ocvtp.stored.fields import from_object
    from ocvtp.stored.strict_json import read_object
    from ocvtp.training.recipe import Recipe

    try:
        settings = from_object(Settings, read_object(path))
        Recipe.from_dict(settings.recipe)
        PrunerConfig.from_dict(settings.pruner)
    except ValueError as error:
        raise UserError(f"--config {path}: {error}; see docs/training.md for what it holds") from error
    return settings


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


def _stored(folder: Path, team: Team, console: Console) -> FeatureSource:
    """The store in ``folder``, after one process has compared all checksums."""
    from ocvtp.training.store import FeatureStore

    def opened() -> FeatureStore:
        store = FeatureStore(folder, verify=False)
        if team.main:
            with share(console, f"checking {folder}") as show:
                store.verify(show)
        return store

    return team.together(opened)


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
