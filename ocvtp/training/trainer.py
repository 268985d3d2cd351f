"""The training loop: published recipe, any number of processes, exact resume.

When what is looked at: losses and norms stay on the device until ``log_every`` steps have passed, an epoch
ends, or a state is about to be saved. Then, and only then, the host waits for the device, processes agree
whether all is well, and rows are written; so a step costs no synchronisation, and a state that holds a NaN
is never saved.

What is written when: rows of metrics, the best pruner into a folder beside its own, then the state, each
flushed before the next, and then the pruner's files are put in place. The state knows rows and pruner by
their digests. A run that dies in between finds rows beyond its state, which it drops, a pruner that no state
knows, which it drops, too, or one that its state knows and that is not in its place yet, which it puts there.
What is there but is not what the state knows was altered, and is refused.

Who stops whom: a process that can't read its features, or can't write, tells the others at the next look,
and all raise. Whatever else ends one process (memory, say) the launcher notices, and ends the others.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ocvtp.atomic import PARTIAL, remove, sync_folder, write_json
from ocvtp.pruner import OCPruner
from ocvtp.pruner.config import PrunerConfig
from ocvtp.stored.refused import refused_as
from ocvtp.stored.seal import file_digest
from ocvtp.training import checkpoint
from ocvtp.training.batches import Batch, HeldOutBatches, TrainingBatches, load
from ocvtp.training.checkpoint import Progress, ResumeError
from ocvtp.training.log import METRICS, TENSORBOARD, MetricsLog, read_rows
from ocvtp.training.metrics import Recent, StepFacts
from ocvtp.training.plan import Plan, default_config, make_plan
from ocvtp.training.plot import PLOT, plot_loss
from ocvtp.training.recipe import Recipe
from ocvtp.training.schedule import warm_cosine
from ocvtp.training.source import FeatureSource
from ocvtp.training.step import Objective, StepLoss, derived_seed, distinct_picks, live_slots
from ocvtp.training.team import Team, TrainingError
from ocvtp_kernels._checks import as_int

__all__ = ["DivergedError", "ResumeError", "Trained", "TrainingError", "default_config", "train"]

#: Folder of the best pruner so far, inside a run's.
PRUNER = "pruner"
_TRAINING = "training.json"
# Of the model card that lies beside the pruner: for people, who may write into it.
_FOR_PEOPLE = ".md"
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Steps in a row that float16 may overflow in: the scale of the loss halves every time, 65536 to below 1.
_MOST_SKIPPED = 20


class DivergedError(TrainingError):
    """The loss became NaN or infinite; the message says when and what to try."""


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


def train(
    source: FeatureSource,
    out: str | Path,
    recipe: Recipe | None = None,
    config: PrunerConfig | None = None,
    *,
    validation: FeatureSource | None = None,
    device: torch.device | None = None,
    fresh: bool = False,
    workers: int = 0,
    log_every: int = 10,
    save_every: int = 200,
    progress: Callable[[int, int, str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Trained:
    """Train a pruner on ``source`` and leave the best, with its decoder, in ``out/pruner``.

    Run again with the same arguments, a run that died goes on where its last state was saved, and ends as it
    would have: on a CPU to the bit. Started by ``accelerate launch`` on several processes, each takes its
    part of every batch; draws are the same, so the result differs from one process's by rounding, and by
    dropout, which every process draws for itself. All processes must see ``out``.

    Args:
        source: features to train on.
        out: folder of the run; made if it is not there.
        recipe: how; the published one by default.
        config: of the pruner, with a decoder; by default :func:`default_config`. Its ``feature_scale`` is
            measured where the recipe says so.
        validation: held-out features; by default a share of the photographs of ``source``.
        device: to compute on; by default what accelerate chooses, a GPU if there is one.
        fresh: forget the run that ``out`` holds.
        workers: processes that read features ahead; 0 reads in between. Results don't depend on it.
        log_every: steps between looks at what was measured, and between rows on the disk.
        save_every: steps between saved states; one is saved after every epoch, too.
        progress: called before every step with steps done, steps in all, and what was measured last.
        say: called with a line for every epoch, and what else a person should know. Like ``progress``, in
            the main process alone.

    Raises:
        ValueError: settings that don't fit the features, each other, or the number of processes.
        ResumeError: ``out`` holds a run with other settings, one whose files are not what was written, or
            something else.
        DivergedError: the loss became NaN or infinite. The last state from before is kept.
        TrainingError: features that can't be read, or another process that failed.
    """
    for name, value in (("log_every", log_every), ("save_every", save_every)):
        if (as_int(value) or 0) < 1:
            raise ValueError(f"{name} must be an int of at least 1; got {value!r}")
    recipe = Recipe() if recipe is None else recipe
    config = default_config(source) if config is None else config
    plan = make_plan(source, validation, recipe, config)
    team = Team(device)
    if recipe.batch_size % team.size:
        raise ValueError(f"batch_size={recipe.batch_size} can't be split evenly over {team.size} processes")
    out = Path(out)
    state, plan = team.together(lambda: _take_up(plan, out, fresh))
    if state.step:
        team.together(lambda: _check_beside(out, state) if team.main else None)
    if state.finished:
        if team.main:  # it may have died just after it finished
            _clear_partial(out)
            if not (out / PLOT).exists():
                plot_loss(out)
        return _trained(out, state, state.step)
    gpus = [team.device] if team.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(recipe.seed)
        pruner = OCPruner(plan.config).to(team.device)
        run = _Run(team, plan, pruner, out, state, log_every, save_every)
        team.together(run.begin)
        return run.to_the_end(workers, progress if team.main else None, say if team.main else None)


def without_decoder(pruner: OCPruner) -> OCPruner:
    """A copy of ``pruner`` that can prune but not be trained: the decoder, most of its size, is left out."""
    config = PrunerConfig.from_dict({**pruner.config.to_dict(), "decoder_layers": 0})
    with torch.device("meta"):
        small = OCPruner(config)
    kept = {key: value for key, value in pruner.state_dict().items() if not key.startswith("decoder.")}
    small.load_state_dict({key: value.clone() for key, value in kept.items()}, assign=True)
    return small.eval()


class _Run:
    """One process's view of a run."""

    def __init__(
        self,
        team: Team,
        plan: Plan,
        pruner: OCPruner,
        out: Path,
        state: Progress,
        log_every: int,
        save_every: int,
    ) -> None:
        self._team, self._plan, self._pruner, self._out, self._state = team, plan, pruner, out, state
        self._log_every, self._save_every = log_every, save_every
        recipe, device = plan.recipe, team.device
        self._objective = Objective(pruner, recipe)
        self._optimizer = torch.optim.AdamW(
            pruner.parameters(),
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            fused=device.type == "cuda",
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=recipe.autocast == "fp16")
        self._batches = TrainingBatches(plan.source, plan.records, recipe, pruner.config.slot_dim, team.part)
        self._held_out = HeldOutBatches(
            plan.held_source, plan.held_out, recipe, pruner.config.slot_dim, team.part
        )
        self._recent = Recent(team, recipe.batch_size)
        self._resumed = state.step
        self._log: MetricsLog | None = None
        self._said = ""

    def begin(self) -> None:
        """Put parameters and moments where they were."""
        state = self._state
        if state.step:
            checkpoint.restore(self._out, self._objective, self._optimizer)
            if state.scaler:
                self._scaler.load_state_dict(state.scaler)

    def to_the_end(
        self,
        workers: int,
        progress: Callable[[int, int, str], None] | None,
        say: Callable[[str], None] | None,
    ) -> Trained:
        """Train what is left."""
        state = self._state
        self._team.together(self._open)
        wrapped = self._team.wrap(self._objective)
        total = len(self._batches)
        loader = self._load(self._batches, range(state.step, total), workers)
        self._objective.train()
        try:
            while not state.finished:
                if progress is not None:
                    progress(state.step, total, self._said)
                self._step(wrapped, next(loader))
                state.step += 1
                epoch, rest = divmod(state.step, self._batches.per_epoch)
                save = rest == 0 or state.step % self._save_every == 0
                if save or state.step % self._log_every == 0:
                    self._look()
                if rest == 0:
                    line = self._finish_epoch(epoch, workers)
                    if say is not None:
                        say(line)
                elif save:
                    self._team.together(self._save)
        finally:
            if self._log is not None:
                self._log.close()
        return _trained(self._out, state, self._resumed)

    def _open(self) -> None:
        if not self._team.main:
            return
        if self._state.step == 0:
            self._out.mkdir(parents=True, exist_ok=True)
            self._write_state()  # before anything else: from now on the folder is this run's
            for name in (TENSORBOARD, PRUNER, METRICS, PLOT):  # of an earlier run
                remove(self._out / name)
        _clear_partial(self._out)
        with refused_as(ResumeError, self._out / METRICS, checkpoint.ADVICE):
            self._log = MetricsLog(self._out, self._state.step, self._state.rows)

    def _load(self, batches: Any, numbers: range, workers: int) -> Iterator[Batch]:
        return load(batches, numbers, workers, pinned=self._team.device.type == "cuda")

    # --------------------------------------------------------------------------------------- training

    def _step(self, wrapped: torch.nn.Module, batch: Batch) -> None:
        """One step, counted from 0 by the state; leaves what it measured on the device."""
        recipe, team, step = self._plan.recipe, self._team, self._state.step
        if batch.error and team.size == 1:  # with others, all stop at the next look
            raise TrainingError(f"step {step + 1}: {batch.error}")
        rate = warm_cosine(
            step,
            len(self._batches),
            round(recipe.warmup_epochs * self._batches.per_epoch),
            recipe.learning_rate,
            recipe.final_learning_rate,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        # Dropout alone is drawn on the device. Nothing that came before must matter, or resuming would.
        torch.manual_seed(derived_seed(recipe.seed, "dropout", step, team.rank))
        with self._autocast():
            made: StepLoss = wrapped(*batch.inputs(team.device))
        loss = made.loss.mean()
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._pruner.parameters(), recipe.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        facts = StepFacts(step + 1, step // self._batches.per_epoch + 1, rate, batch.noise.shape[1])
        self._recent.add(facts, loss, live_slots(made.slot_attention).mean(), norm, batch.error)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        dtype = _AUTOCAST.get(self._plan.recipe.autocast)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._team.device.type, dtype)

    def _look(self) -> None:
        """Write what was measured, and stop if it is not well.

        Raises:
            DivergedError, TrainingError: the same in all processes.
        """
        rows, error, failed = self._recent.look()
        if failed:
            raise TrainingError(
                f"step {rows[-1]['step']} or shortly before: {error}"
                if error
                else "another process could not read its features and says why; all have stopped"
            )
        self._team.together(lambda: self._write_rows("train", rows))
        for row in rows:
            self._judge(row)
        self._said = f"loss {rows[-1]['loss']:.4f}" if rows[-1]["loss"] is not None else self._said

    def _write_rows(self, kind: str, rows: list[dict[str, Any]]) -> None:
        if self._log is not None:
            for row in rows:
                self._log.write(kind, row)

    def _judge(self, row: dict[str, Any]) -> None:
        state = self._state
        if row["loss"] is not None and row["gradient_norm"] is not None:
            state.skipped = 0
            return
        if not self._scaler.is_enabled():
            what = "loss" if row["loss"] is None else "norm of the gradient"
            raise DivergedError(
                f"the {what} is NaN or infinite in step {row['step']}. {self._kept()} In another folder, try "
                "a lower learning_rate, a longer warmup_epochs, or autocast none"
            )
        # The scaler has left that step's update out, and halved the scale.
        state.skipped += 1
        if state.skipped >= _MOST_SKIPPED:
            raise DivergedError(
                f"float16 overflowed in {state.skipped} steps in a row, the last is step {row['step']}. "
                f"{self._kept()} In another folder, try autocast bf16 or none"
            )

    def _kept(self) -> str:
        saved = checkpoint.read_progress(self._out)
        step = 0 if saved is None else saved.step
        best = f", the best pruner so far in {self._out / PRUNER}" if self._state.best_epoch else ""
        return f"Kept are the state after step {step}{best}."

    # ------------------------------------------------------------------------------------- validation

    def _finish_epoch(self, epoch: int, workers: int) -> str:
        """Validate, save; returns what to say."""
        state, recipe = self._state, self._plan.recipe
        row = self._held_out_loss(workers)
        if not math.isfinite(row["loss"]):
            raise DivergedError(
                f"the loss of held-out images is NaN or infinite after step {state.step}. {self._kept()} "
                "In another folder, try a lower learning_rate, or autocast bf16 or none"
            )
        better = state.best_loss is None or row["loss"] < state.best_loss
        if better:
            state.best_loss, state.best_epoch, state.stale = row["loss"], epoch, 0
        else:
            state.stale += 1
        if epoch == recipe.epochs:
            state.finished = "all epochs"
        elif state.stale >= recipe.patience:
            state.finished = "early"

        def write() -> None:
            self._write_rows("validation", [{"step": state.step, "epoch": epoch, **row}])
            if better and self._team.main:
                self._write_pruner()
            self._save()
            if self._team.main:
                if better:
                    _put_in_place(self._out)
                plot_loss(self._out)

        self._team.together(write)
        return (
            f"epoch {epoch} of {recipe.epochs}: {self._said or 'no finite loss'}, held out {row['loss']:.4f}"
            f"{' (best)' if better else ''}, live slots {row['live_slots']:.0%}"
        )

    @torch.no_grad()
    def _held_out_loss(self, workers: int) -> dict[str, float]:
        """Means over all held-out images, each counted once.

        Raises:
            TrainingError: features that can't be read, here or in another process.
        """
        self._objective.eval()
        measured, error = [], ""
        for batch in self._load(self._held_out, range(len(self._held_out)), workers):
            error = error or batch.error
            if len(batch.features):
                with self._autocast():
                    made: StepLoss = self._objective(*batch.inputs(self._team.device))
                attention = made.slot_attention
                measured.append(
                    torch.stack([made.loss.float(), live_slots(attention), distinct_picks(attention)], dim=1)
                )
        self._objective.train()
        sums = torch.zeros(5, dtype=torch.float64)
        if measured:
            found = torch.cat(measured).cpu().double()
            sums[:3], sums[3] = found.sum(dim=0), len(found)
        sums[4] = float(bool(error))
        loss, live, distinct, images, failed = self._team.sum(sums).tolist()
        if failed:
            raise TrainingError(
                f"held-out images: {error}"
                if error
                else "another process could not read its features and says why; all have stopped"
            )
        return {"loss": loss / images, "live_slots": live / images, "distinct_picks": distinct / images}

    # ----------------------------------------------------------------------------------------- saving

    def _save(self) -> None:
        if not self._team.main:
            return
        assert self._log is not None
        self._log.sync()
        self._state.rows = self._log.rows
        self._write_state()

    def _write_state(self) -> None:
        state = self._state
        state.scaler = self._scaler.state_dict()
        state.versions = _versions()
        checkpoint.save(self._out, state, self._objective, self._optimizer)

    def _write_pruner(self) -> None:
        """The pruner as it is now, beside the folder that it will lie in once the state knows it."""
        state, made = self._state, self._out / (PRUNER + PARTIAL)
        remove(made)
        self._pruner.save_pretrained(made)
        training = {
            "recipe": self._plan.recipe.to_dict(),
            "features": self._plan.identity["features"],
            "step": state.step,
            "epoch": state.best_epoch,
            "held_out_loss": state.best_loss,
            "held_out_images": len(self._plan.held_out),
            "training_images": len(self._plan.records),
            "versions": _versions(),
        }
        write_json(made / _TRAINING, training)
        files = sorted(made.iterdir())
        for file in files:
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        sync_folder(made)
        state.pruner = {file.name: file_digest(file) for file in files if file.suffix != _FOR_PEOPLE}


def _put_in_place(out: Path) -> None:
    """The pruner that was written last, every file atomically; in a run, its config never changes."""
    made, folder = out / (PRUNER + PARTIAL), out / PRUNER
    folder.mkdir(exist_ok=True)
    for file in sorted(made.iterdir()):
        os.replace(file, folder / file.name)
    made.rmdir()
    for changed in (folder, out):
        sync_folder(changed)


def _take_up(plan: Plan, out: Path, fresh: bool) -> tuple[Progress, Plan]:
    """Where the run in ``out`` stands, or a new one's start; the plan, its features measured.

    Raises:
        ResumeError: see :func:`train`.
    """
    held = (out / checkpoint.STATE).exists()
    if not held and out.exists():
        left = checkpoint.STATE + PARTIAL  # of a run that died before its first state
        entries = out.iterdir() if out.is_dir() else ()
        if foreign := sorted(path.name for path in entries if path.name != left):
            raise ResumeError(
                f"{out} is not empty and holds no run ({foreign[0]} is there, {checkpoint.STATE} is not); "
                "give another folder"
            )
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ResumeError(f"{parent} is a file; give a folder")
    if not os.access(parent, os.W_OK):
        raise ResumeError(f"no permission to write to {parent}; give another folder")
    _check_places(out)
    state = None if fresh else checkpoint.read_progress(out)
    if state is None:
        plan = plan.scaled(None)
        return Progress(plan.identity), plan
    plan = plan.scaled(state.identity.get("pruner", {}).get("feature_scale"))  # measured once
    checkpoint.check_same(out, state.identity, plan.identity)
    return state, plan


def _check_places(out: Path) -> None:
    """Raise :class:`ResumeError` where a file of a run could not be written, or a folder."""
    for name in (checkpoint.STATE, METRICS, PLOT):
        if (out / name).exists() and not (out / name).is_file():
            raise ResumeError(f"{out / name} is no file, and a run keeps one there; move it away")
    for name in (PRUNER, TENSORBOARD):
        if os.path.lexists(out / name) and not (out / name).is_dir():
            raise ResumeError(f"{out / name} is no folder, and a run keeps one there; move it away")


def _check_beside(out: Path, state: Progress) -> None:
    """Compare rows and pruner with what the state knows of them; put in place what a killed run did not.

    Raises:
        ResumeError: names the file that is not what was written.
    """
    with refused_as(ResumeError, out / METRICS, checkpoint.ADVICE):
        read_rows(out, state.rows)
    folder, made = out / PRUNER, out / (PRUNER + PARTIAL)

    def waits(name: str) -> bool:
        return not made.is_symlink() and _is(made / name, state.pruner[name])

    missing = [name for name, digest in state.pruner.items() if not _is(folder / name, digest)]
    if damaged := [folder / name for name in missing if not waits(name)]:
        what = "not what was written: changed or damaged" if damaged[0].exists() else "missing"
        raise ResumeError(f"{damaged[0]} is {what}; {checkpoint.ADVICE}")
    if missing:
        _put_in_place(out)


def _is(file: Path, digest: str) -> bool:
    return file.is_file() and file_digest(file) == digest


def _clear_partial(out: Path) -> None:
    """Take away what was being written when an earlier run died."""
    for name in (checkpoint.STATE, METRICS, PLOT, PRUNER):
        remove(out / (name + PARTIAL))


def _trained(out: Path, state: Progress, resumed: int) -> Trained:
    assert state.best_loss is not None  # an epoch has ended
    return Trained(out / PRUNER, state.step, state.best_loss, state.best_epoch, state.finished, resumed)


def _versions() -> dict[str, str]:
    from ocvtp import __version__

    return {"ocvtp": __version__, "torch": torch.__version__}
