"""The training loop: published recipe, any number of processes, exact resume."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ocvtp.config import PrunerConfig
from ocvtp.pruner import OCPruner
from ocvtp.training import checkpoint
from ocvtp.training.batches import Batch, Part, TrainingSteps, validation_batches
from ocvtp.training.checkpoint import Progress
from ocvtp.training.log import MetricsLog, plot_loss
from ocvtp.training.recipe import Recipe
from ocvtp.training.schedule import warm_cosine
from ocvtp.training.source import FeatureSource
from ocvtp.training.split import split
from ocvtp.training.step import Objective, StepLoss, distinct_picks, live_slots, standard_deviation

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Folder of the best pruner so far, inside a run's.
PRUNER = "pruner"
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Steps in a row that float16 may overflow in: the scale of the loss halves every time.
_MOST_SKIPPED = 30
# Records that the features' standard deviation is measured on.
_SAMPLE = 64


class DivergedError(RuntimeError):
    """The loss became NaN or infinite; the message says since when and what to try."""


@dataclass(frozen=True)
class Trained:
    """What a run came to.

    Attributes:
        pruner: folder of the best pruner, for :meth:`ocvtp.OCPruner.from_pretrained`.
        steps: done in all.
        best_loss: on the held-out images.
        best_epoch: counted from 1.
        finished: ``"all epochs"`` or ``"early"``.
        resumed: step this call went on from; 0 for a new run.
    """

    pruner: Path
    steps: int
    best_loss: float
    best_epoch: int
    finished: str
    resumed: int


def default_config(source: FeatureSource, **changes: Any) -> PrunerConfig:
    """The official proportions at the width of ``source``, with a decoder; ``changes`` win."""
    width = source.width
    sizes: dict[str, Any] = {
        "in_dim": width,
        "hidden_dim": 2 * width,
        "slot_dim": max(16, width // 2 // 16 * 16),
        "ffn_dim": 2 * width,
        "layer": source.layer,
        "decoder_layers": 4,
        "decoder_ffn_dim": 4 * width,
        "decoder_tokens": source.tokens,
    }
    return PrunerConfig(**{**sizes, **changes})


def train(
    source: FeatureSource,
    out: str | Path,
    recipe: Recipe | None = None,
    config: PrunerConfig | None = None,
    *,
    validation: FeatureSource | None = None,
    cpu: bool = False,
    workers: int = 0,
    log_every: int = 10,
    save_every: int = 200,
    progress: Callable[[int, int, str], None] | None = None,
) -> Trained:
    """Train a pruner on ``source`` and leave the best in ``out/pruner``.

    Run again with the same arguments, a run that died goes on where its last state was saved, and ends as it
    would have: on the same machine to the bit. Started by ``accelerate launch`` on several processes, each
    takes its part of every batch; the result differs from one process's by rounding, and by dropout.

    Args:
        source: features to train on.
        out: folder of the run; made if it is not there.
        recipe: how; the published one by default.
        config: of the pruner, with a decoder; by default :func:`default_config`. Its ``feature_scale`` is
            measured where the recipe says so.
        validation: held-out features; by default a share of the photographs of ``source``.
        cpu: compute on the CPU even where there is a GPU.
        workers: processes that read features ahead; 0 reads in between. Results don't depend on it.
        log_every: steps between rows of metrics.
        save_every: steps between saved states, rounded up to a multiple of ``log_every``.
        progress: called with steps done, steps in all, and what was measured last.

    Raises:
        ValueError: settings that don't fit the features, each other, or the number of processes.
        ResumeError: ``out`` holds a run with other settings, or something else.
        DivergedError: the loss became NaN or infinite. The last state from before is kept.
    """
    recipe = Recipe() if recipe is None else recipe
    config = default_config(source) if config is None else config
    out = Path(out)
    records, held_out = _records(source, validation, recipe)
    held_source = source if validation is None else validation
    _check(source, held_source, recipe, config, len(records), log_every, save_every)
    if recipe.unit_variance:
        config = dataclasses.replace(config, feature_scale=_scale(source, records))
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=cpu)
    # Accelerate's own mixed precision is one for the life of a process, and would not be the recipe's.
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"accelerate is set to mixed precision {accelerator.mixed_precision}: set it to no, and the "
            "recipe's autocast to what you want"
        )
    part = Part(accelerator.process_index, accelerator.num_processes)
    if recipe.batch_size % part.processes:
        raise ValueError(
            f"batch_size={recipe.batch_size} can't be split over {part.processes} processes evenly"
        )
    identity = {
        "recipe": recipe.to_dict(),
        "pruner": config.to_dict(),
        "features": {
            "fingerprint": source.fingerprint,
            "training": _digest(source, records),
            "validation": _digest(held_source, held_out),
        },
    }
    state = checkpoint.read_progress(out)
    if state is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())) and not _only_logs(out):
            raise checkpoint.ResumeError(f"{out} is not empty and holds no run; give another folder")
        state = Progress(identity)
    checkpoint.check_same(out, state.identity, identity)
    accelerator.wait_for_everyone()
    gpus = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(recipe.seed)
        pruner = OCPruner(config)
        steps = TrainingSteps(source, records, recipe, config.slot_dim, part)
        run = _Run(accelerator, pruner, recipe, out, state, steps, log_every, save_every)
        return run.to_the_end(
            lambda: validation_batches(held_source, held_out, recipe, config.slot_dim, part),
            workers,
            progress,
        )


class _Run:
    """One process's view of a run."""

    def __init__(
        self,
        accelerator: Accelerator,
        pruner: OCPruner,
        recipe: Recipe,
        out: Path,
        state: Progress,
        steps: TrainingSteps,
        log_every: int,
        save_every: int,
    ) -> None:
        device = accelerator.device
        objective = Objective(pruner, recipe).to(device)
        optimizer = torch.optim.AdamW(
            objective.parameters(),
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            fused=device.type == "cuda",
        )
        self._resumed = state.step
        if state.step:
            checkpoint.restore(out, objective, optimizer, device)
        self._accelerator, self._recipe, self._out, self._state = accelerator, recipe, out, state
        self._steps, self._objective = steps, objective
        self._log_every = log_every
        self._save_every = -(-save_every // log_every) * log_every
        self._optimizer = optimizer
        self._wrapped = accelerator.prepare_model(objective)
        self._scaler = torch.amp.GradScaler(device.type, enabled=recipe.autocast == "fp16")
        if state.scaler:
            self._scaler.load_state_dict(state.scaler)
        self._log: MetricsLog | None = None
        self._window = _Window(device)

    def to_the_end(
        self,
        held_out: Callable[[], Any],
        workers: int,
        progress: Callable[[int, int, str], None] | None,
    ) -> Trained:
        """Train what is left."""
        state, main = self._state, self._accelerator.is_main_process
        if not state.finished:
            if main:
                self._out.mkdir(parents=True, exist_ok=True)
                self._log = MetricsLog(self._out, state.step)
            try:
                self._train(held_out, workers, progress)
            finally:
                if self._log is not None:
                    self._log.close()
        assert state.best_loss is not None
        return Trained(
            self._out / PRUNER, state.step, state.best_loss, state.best_epoch, state.finished, self._resumed
        )

    def _train(
        self, held_out: Callable[[], Any], workers: int, progress: Callable[[int, int, str], None] | None
    ) -> None:
        state, total = self._state, len(self._steps)
        pinned = self._accelerator.device.type == "cuda"
        loader = self._steps.loader(state.step, workers, pinned)
        for step in range(state.step, total):
            if progress is not None:
                progress(step, total, self._window.said)
            self._step(step, next(loader))
            state.step = step + 1
            epoch, rest = divmod(state.step, self._steps.per_epoch)
            if rest == 0 or state.step % self._log_every == 0:
                self._write_window()
            if rest == 0:
                self._validate(epoch, held_out)
                if state.finished:
                    return
            elif state.step % self._save_every == 0:
                self._save()

    def _step(self, step: int, batch: Batch) -> None:
        recipe, accelerator = self._recipe, self._accelerator
        rate = warm_cosine(
            step,
            len(self._steps),
            round(recipe.warmup_epochs * self._steps.per_epoch),
            recipe.learning_rate,
            recipe.final_learning_rate,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        # Dropout is the one draw that is made on the device: of every step and process its own.
        torch.manual_seed(_number(recipe.seed, "dropout", step, accelerator.process_index))
        self._wrapped.train()
        with self._autocast():
            loss = self._wrapped(*batch.to(accelerator.device)).loss.mean()
        self._optimizer.zero_grad()
        accelerator.backward(self._scaler.scale(loss))
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._objective.parameters(), recipe.clip)
        skipped = self._apply_gradients()
        self._window.add(step, loss.detach(), norm, rate, batch.noise.shape[1], recipe.batch_size, skipped)

    def _apply_gradients(self) -> bool:
        """Step the optimizer; true where a float16 gradient overflowed and the step was left out."""
        self._scaler.step(self._optimizer)
        if not self._scaler.is_enabled():
            return False
        scale = self._scaler.get_scale()
        self._scaler.update()
        return self._scaler.get_scale() < scale

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        dtype = _AUTOCAST.get(self._recipe.autocast)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._accelerator.device.type, dtype)

    def _write_window(self) -> None:
        """A row of metrics; the one moment at which the host looks at the device."""
        row = self._window.row(self._accelerator)
        self._window.stop_if_diverged()
        if self._log is not None:
            self._log.write("train", self._state.step, row)

    def _validate(self, epoch: int, held_out: Callable[[], Any]) -> None:
        state, recipe = self._state, self._recipe
        row = self._held_out_loss(held_out())
        if not math.isfinite(row["loss"]):
            raise DivergedError(_diverged(state.step))
        if self._log is not None:
            self._log.write("validation", state.step, {"epoch": epoch, **row})
        if state.best_loss is None or row["loss"] < state.best_loss:
            state.best_loss, state.best_epoch, state.stale = row["loss"], epoch, 0
            if self._accelerator.is_main_process:
                _save_pruner(self._objective.pruner, self._out / PRUNER)
        else:
            state.stale += 1
        if epoch == recipe.epochs:
            state.finished = "all epochs"
        elif state.stale >= recipe.patience:
            state.finished = "early"
        self._save()
        if self._accelerator.is_main_process:
            plot_loss(self._out)

    @torch.no_grad()
    def _held_out_loss(self, batches: Any) -> dict[str, float]:
        self._objective.eval()
        device = self._accelerator.device
        sums = torch.zeros(4, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        for batch in batches:
            with self._autocast():
                made: StepLoss = self._objective(*batch.to(device))
            shares = (made.loss, live_slots(made.slot_attention), distinct_picks(made.slot_attention))
            sums += torch.stack(
                [*(share.double().sum() for share in shares), sums.new_tensor(len(made.loss))]
            )
        loss, live, distinct, images = self._accelerator.reduce(sums, reduction="sum").tolist()
        return {"loss": loss / images, "live_slots": live / images, "distinct_picks": distinct / images}

    def _save(self) -> None:
        self._state.scaler = self._scaler.state_dict()  # empty unless it is float16's
        if self._accelerator.is_main_process:
            checkpoint.save(self._out, self._state, self._objective, self._optimizer)
        self._accelerator.wait_for_everyone()


class _Window:
    """Steps since the last row of metrics. Nothing is read from the device before :meth:`row`."""

    def __init__(self, device: torch.device) -> None:
        self.said = ""
        self._loss = torch.zeros((), device=device)
        self._norm = torch.zeros((), device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._skipped = 0
        self._clear()

    def _clear(self) -> None:
        self._loss.zero_()
        self._norm.zero_()
        self._steps, self._images, self._start = 0, 0, time.perf_counter()

    def add(
        self,
        step: int,
        loss: torch.Tensor,
        norm: torch.Tensor,
        rate: float,
        slots: int,
        images: int,
        skipped: bool,
    ) -> None:
        """One step."""
        self._steps += 1
        self._images += images
        self._rate, self._slots = rate, slots
        self._skipped = self._skipped + 1 if skipped else 0
        self._loss += loss
        self._norm = torch.where(norm.isfinite(), torch.maximum(self._norm, norm), self._norm)
        if skipped:  # the scaled gradient overflowed and was thrown away
            return
        bad = ~(loss.isfinite() & norm.isfinite())
        self._first_bad = torch.where(bad & (self._first_bad < 0), step, self._first_bad)

    def row(self, accelerator: Accelerator) -> dict[str, float]:
        """Means of the window, of all processes; starts the next one."""
        loss = float(accelerator.reduce(self._loss / self._steps, reduction="mean"))
        self._first_bad = accelerator.gather(self._first_bad.reshape(1)).max()
        seconds = time.perf_counter() - self._start
        row = {
            "loss": loss,
            "gradient_norm": float(self._norm),
            "learning_rate": self._rate,
            "slots": self._slots,
            "images_per_second": self._images / seconds,
        }
        self.said = f"loss {loss:.4f}"
        self._clear()
        return row

    def stop_if_diverged(self) -> None:
        """Raise :class:`DivergedError` if any step so far was not finite."""
        first_bad = int(self._first_bad)
        if first_bad >= 0:
            raise DivergedError(_diverged(first_bad))
        if self._skipped >= _MOST_SKIPPED:
            raise DivergedError(
                f"float16 overflowed in {self._skipped} steps in a row, whatever the scale of the loss: "
                "train with autocast bf16 or none. What was saved before is kept"
            )


def _diverged(step: int) -> str:
    return (
        f"the loss or its gradient is NaN or infinite since step {step}. What was saved before is kept; try "
        "a lower learning_rate, a longer warmup_epochs, or autocast none"
    )


def _records(
    source: FeatureSource, validation: FeatureSource | None, recipe: Recipe
) -> tuple[Sequence[int], Sequence[int]]:
    if validation is None:
        return split(source.images, recipe.validation_share, recipe.seed)
    if validation.fingerprint != source.fingerprint:
        raise ValueError(
            "training and validation features are of different encoders, layers or preprocessing"
        )
    if shared := set(source.images) & set(validation.images):
        raise ValueError(f"{len(shared)} photographs are in both training and validation features")
    return range(len(source)), range(len(validation))


def _check(
    source: FeatureSource,
    held_source: FeatureSource,
    recipe: Recipe,
    config: PrunerConfig,
    records: int,
    log_every: int,
    save_every: int,
) -> None:
    """Everything that would fail later.

    Raises:
        ValueError: see :func:`train`.
    """
    if records < recipe.batch_size:
        raise ValueError(
            f"{records} records to train on are fewer than a batch of {recipe.batch_size}: give more images "
            "or crops, or a smaller batch_size"
        )
    if log_every < 1 or save_every < 1:
        raise ValueError(f"log_every and save_every must be at least 1; got {log_every} and {save_every}")
    if not config.decoder_layers:
        raise ValueError(
            "the pruner's config has no decoder (decoder_layers=0), so there is nothing to train"
        )
    for name, mine, theirs in (
        ("in_dim", config.in_dim, source.width),
        ("layer", config.layer, source.layer),
        ("decoder_tokens", config.decoder_tokens, source.tokens),
        ("decoder_tokens", config.decoder_tokens, held_source.tokens),
    ):
        if mine != theirs:
            raise ValueError(f"the pruner's {name} is {mine}, the features' is {theirs}")
    if too_many := [count for count in recipe.slots if count > source.tokens]:
        raise ValueError(
            f"slots {too_many} are more than the {source.tokens} tokens of an image; leave them out"
        )


def _only_logs(out: Path) -> bool:
    """Whether a folder holds nothing but what a run leaves that died before its first state."""
    from ocvtp.training.log import METRICS

    known = {METRICS, "tensorboard", PRUNER, checkpoint.STATE + ".partial"}
    return out.is_dir() and all(path.name in known for path in out.iterdir())


def _save_pruner(pruner: OCPruner, folder: Path) -> None:
    """``save_pretrained``, every file of it put in place atomically; a run's config never changes."""
    import os
    import shutil

    from ocvtp.atomic import sync_folder

    fresh = folder.with_name(folder.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    pruner.save_pretrained(fresh)
    folder.mkdir(exist_ok=True)
    for file in sorted(fresh.iterdir()):
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
        os.replace(file, folder / file.name)
    fresh.rmdir()
    sync_folder(folder)


def _scale(source: FeatureSource, records: Sequence[int]) -> float:
    """Standard deviation of the features, as a sample spread over the records has it.

    Raises:
        ValueError: features that are all the same, or not finite.
    """
    step = max(1, len(records) // _SAMPLE)
    scale = standard_deviation(source.batch([records[i] for i in range(0, len(records), step)][:_SAMPLE]))
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"the features' standard deviation is {scale}: there is nothing to learn from them")
    return scale


def _digest(source: FeatureSource, records: Sequence[int]) -> str:
    """Which photographs, in which order."""
    total = hashlib.sha256(source.fingerprint.encode())
    for record in records:
        total.update(source.images[record].encode())
    return total.hexdigest()[:16]


def _number(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
