"""Training, resumable: killed at any moment it goes on from its last checkpoint, with the same pictures."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from bench.harness import provenance
from bench.testbed.batches import Batches
from bench.testbed.model import build
from bench.testbed.network import DenseHead, judge
from bench.testbed.optimiser import Optimiser
from bench.testbed.packing import Batch
from bench.testbed.recipe import Recipe, Stage
from ocvtp.atomic import write_atomic, write_json
from ocvtp.training.team import Team

CHECKPOINT, LOG, RUN = "checkpoint.pt", "log.jsonl", "run.json"
_CLIP = 1.0
_VALIDATION_BATCH = 20
_VALIDATION_QUESTIONS = 8
_LOG_EVERY = 50


class Run:
    """A training run in a folder.

    Args:
        recipe: of it.
        out: folder, made or gone on in.
        device: to train on.
        workers: processes that make pictures, for every process that trains.
        commit: of this tree, where git can't tell.

    Raises:
        ValueError: the folder holds a run of another recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        device: torch.device,
        workers: int = 1,
        commit: str | None = None,
    ) -> None:
        self._recipe, self._out, self._workers = recipe, out, workers
        self._team = Team(device)
        self._device = self._team.device
        torch.manual_seed(recipe.seed)
        self.model = build(recipe.size).to(self._device)
        self.head = DenseHead(recipe.size.width).to(self._device)
        self._stage, self._step = 0, 0
        self._seconds, self._clock = 0.0, 0.0
        self._saved: list[dict[str, Any]] | None = None
        self._start: dict[str, Any] | None = {
            **provenance(self._device, commit),
            "processes": self._team.size,
        }
        self._starts: list[dict[str, Any]] = []
        self._resume()

    @property
    def first(self) -> bool:
        """Whether this process speaks for all of them."""
        return self._team.main

    @property
    def done(self) -> bool:
        """Whether all stages are."""
        return self._stage == len(self._recipe.stages)

    @property
    def seconds(self) -> float:
        """Spent training, over all starts; without what was lost when one was killed."""
        return self._seconds

    def _resume(self) -> None:
        about = self._out / RUN
        if about.exists():
            before = json.loads(about.read_text())
            if before["recipe"] != self._recipe.to_dict():
                raise ValueError(f"{self._out} holds a run of another recipe: choose another folder")
            self._starts = before["starts"]
        if (self._out / CHECKPOINT).exists():
            saved = torch.load(self._out / CHECKPOINT, map_location="cpu", weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.head.load_state_dict(saved["head"])
            self._stage, self._step, self._seconds = saved["stage"], saved["step"], saved["seconds"]
            self._saved = saved["optimiser"]

    def _begin(self) -> None:
        """Note in the folder who trains from here on; looking at a run leaves it as it is."""
        if self._start is None or not self._team.main:
            return
        self._out.mkdir(parents=True, exist_ok=True)
        at = {"stage": self._recipe.stages[self._stage].name, "step": self._step}
        starts = [*self._starts, {**self._start, **at}]
        write_json(self._out / RUN, {"recipe": self._recipe.to_dict(), "starts": starts})
        self._forget_later_lines()
        self._start = None

    def _forget_later_lines(self) -> None:
        """Take off the log what a killed run wrote after its last checkpoint, and will do again."""
        log = self._out / LOG
        if not log.exists():
            return
        order = {stage.name: number for number, stage in enumerate(self._recipe.stages)}
        kept = []
        for text in log.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # cut off in the middle
                break
            if (order[line["stage"]], line["step"]) > (self._stage, self._step):
                break
            kept.append(text + "\n")
        write_atomic(log, lambda partial: partial.write_text("".join(kept), encoding="utf-8"))

    def train(self, limit: float | None = None) -> bool:
        """Go on for at most ``limit`` seconds; whether all stages are done."""
        end = math.inf if limit is None else time.monotonic() + limit
        if not self.done:
            self._begin()
        while not self.done:
            if not self._train_stage(self._recipe.stages[self._stage], end):
                return False
            self._stage, self._step = self._stage + 1, 0
            self._count_seconds()
            self._save(None)
        return True

    def _train_stage(self, stage: Stage, end: float) -> bool:
        optimiser = Optimiser(self.model, self.head, stage, self._recipe.weight_decay)
        if self._saved is not None:
            optimiser.load_state_dict(self._saved)
            self._saved = None
        values: dict[str, list[float]] = defaultdict(list)
        self._clock = time.monotonic()
        self.model.train()
        for batch in self._batches(stage):
            for name, value in self._learn(batch, stage, optimiser).items():
                values[name].append(value)
            self._step += 1
            last = self._step == stage.steps
            if self._step % _LOG_EVERY == 0 or last:
                self._count_seconds()
                self._log(stage, {name: float(np.mean(each)) for name, each in values.items()})
                values.clear()
            regular = self._step % self._recipe.validate_every == 0
            if stage.questions and (regular or last) and self._team.main:
                self._log(stage, {"validation": self.validate()})
            stop = not last and self._late(end)
            if regular or stop:
                self._count_seconds()
                self._save(optimiser)
            if stop:
                self._saved = optimiser.state_dict()
                return False
        return True

    def _late(self, end: float) -> bool:
        """Whether it is in any process: all of them stop at the same step."""
        return bool(self._team.sum(torch.tensor([float(time.monotonic() > end)])))

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self._seconds += now - self._clock
        self._clock = now

    def _learn(self, batch: Batch, stage: Stage, optimiser: Optimiser) -> dict[str, float]:
        """One step; its losses."""
        with torch.autocast(self._device.type, torch.bfloat16):
            outcome = judge(self.model, self.head, batch, stage.dense, self._recipe.blind)
        outcome.loss.backward()
        self._team.average(optimiser.parameters)
        torch.nn.utils.clip_grad_norm_(optimiser.parameters, _CLIP)
        optimiser.step(self._step)
        losses = {name: float(part.detach()) for name, part in outcome.parts.items()}
        if len(outcome.correct):
            losses["accuracy"] = float(outcome.correct.float().mean())
        return losses

    def _batches(self, stage: Stage) -> Iterator[Batch]:
        before = sum(s.steps * s.batch for s in self._recipe.stages[: self._stage])
        batches = Batches(
            self._recipe,
            "train",
            before + self._step * stage.batch,
            stage.batch,
            stage.steps - self._step,
            stage.questions,
            part=(self._team.rank, self._team.size),
            stretched=self._recipe.stretched,
            crowded=stage.crowded,
            things=stage.things,
        )
        loader = DataLoader(batches, batch_size=None, num_workers=self._workers, worker_init_fn=_one_thread)
        for batch in loader:
            yield batch.to(self._device)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Accuracy on the validation split by kind of question, and over all."""
        self.model.eval()
        count = self._recipe.validation // _VALIDATION_BATCH
        batches = Batches(self._recipe, "validation", 0, _VALIDATION_BATCH, count, _VALIDATION_QUESTIONS)
        right: dict[str, list[float]] = defaultdict(list)
        for number in range(count):
            batch = batches[number].to(self._device)
            outcome = judge(self.model, None, batch, 0.0, self._recipe.blind)
            for kind, correct in zip(batch.kinds, outcome.correct.tolist(), strict=True):
                right[kind].append(correct)
                right["all"].append(correct)
        self.model.train()
        return {kind: float(np.mean(each)) for kind, each in sorted(right.items())}

    def _log(self, stage: Stage, values: dict[str, Any]) -> None:
        if self._team.main:
            line = {"stage": stage.name, "step": self._step, "seconds": round(self._seconds), **values}
            with (self._out / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)

    def _save(self, optimiser: Optimiser | None) -> None:
        if not self._team.main:
            return
        state = {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimiser": None if optimiser is None else optimiser.state_dict(),
            "stage": self._stage,
            "step": self._step,
            "seconds": self._seconds,
        }
        write_atomic(self._out / CHECKPOINT, lambda partial: torch.save(state, partial))


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
