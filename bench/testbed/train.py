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
from torch.utils.data import DataLoader, Dataset

from bench.harness import provenance
from bench.testbed.examples import Split, example
from bench.testbed.language import WORDS
from bench.testbed.model import build
from bench.testbed.network import DenseHead, Outcome, judge
from bench.testbed.packing import Batch, pack
from bench.testbed.recipe import Recipe, Stage
from ocvtp.atomic import write_atomic, write_json

CHECKPOINT, LOG, RUN = "checkpoint.pt", "log.jsonl", "run.json"
_CLIP = 1.0
_LEAST_STRETCH = 0.05
_VALIDATION_BATCH = 20
_LOG_EVERY = 50


class Examples(Dataset[Any]):
    """Packed batches of a split, by number.

    Args:
        split: of the pictures.
        first: picture of the first batch.
        batch: pictures of one.
        count: batches.
        questions: asked about every picture.
        recipe: of the run.
        stretched: share of pictures with stretched positions.
    """

    def __init__(
        self,
        split: Split,
        first: int,
        batch: int,
        count: int,
        questions: int,
        recipe: Recipe,
        stretched: float,
    ) -> None:
        self._split, self._first, self._batch, self._count = split, first, batch, count
        self._questions, self._recipe, self._stretched = questions, recipe, stretched
        self._vocabulary = {word: number for number, word in enumerate(WORDS)}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Batch:
        numbers = range(self._first + number * self._batch, self._first + (number + 1) * self._batch)
        examples = [example(self._split, i, self._questions) for i in numbers]
        stretch = [self._stretch(i) for i in numbers]
        return pack(examples, self._vocabulary, self._recipe.size.patch, stretch)

    def _stretch(self, index: int) -> float:
        rng = np.random.default_rng([self._recipe.seed, index])
        if rng.random() >= self._stretched:
            return 1.0
        return float(np.exp(rng.uniform(np.log(_LEAST_STRETCH), 0)))


class Run:
    """A training run in a folder.

    Args:
        recipe: of it.
        out: folder, made or gone on in.
        device: to train on.
        workers: processes that make pictures.

    Raises:
        ValueError: the folder holds a run of another recipe.
    """

    def __init__(self, recipe: Recipe, out: Path, device: torch.device, workers: int = 1) -> None:
        self._recipe, self._out, self._device, self._workers = recipe, out, device, workers
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        self.model = build(recipe.size).to(device)
        self.head = DenseHead(recipe.size.width).to(device)
        self._stage, self._step = 0, 0
        self._seconds = 0.0
        self._saved: dict[str, Any] | None = None
        self._resume()

    def _resume(self) -> None:
        about = self._out / RUN
        if about.exists():
            before = json.loads(about.read_text())
            if before["recipe"] != self._recipe.to_dict():
                raise ValueError(f"{self._out} holds a run of another recipe: choose another folder")
        else:
            write_json(about, {**provenance(self._device), "recipe": self._recipe.to_dict()})
        if (self._out / CHECKPOINT).exists():
            saved = torch.load(self._out / CHECKPOINT, map_location=self._device, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.head.load_state_dict(saved["head"])
            self._stage, self._step, self._seconds = saved["stage"], saved["step"], saved["seconds"]
            self._saved = saved["optimiser"]

    @property
    def done(self) -> bool:
        """Whether all stages are."""
        return self._stage == len(self._recipe.stages)

    @property
    def seconds(self) -> float:
        """Spent training, over all starts."""
        return self._seconds

    def train(self, limit: float | None = None) -> bool:
        """Go on for at most ``limit`` seconds; whether all stages are done."""
        end = math.inf if limit is None else time.monotonic() + limit
        while self._stage < len(self._recipe.stages):
            if not self._train_stage(self._recipe.stages[self._stage], end):
                return False
            self._stage, self._step = self._stage + 1, 0
            self._save(None)
        return True

    def _train_stage(self, stage: Stage, end: float) -> bool:
        optimiser = self._optimiser(stage)
        losses: dict[str, list[float]] = defaultdict(list)
        begun = time.monotonic()
        self.model.train()
        for batch in self._batches(stage):
            for group in optimiser.param_groups:
                group["lr"] = stage.learning_rate * _schedule(self._step, stage)
            outcome = self._judge(batch, stage)
            optimiser.zero_grad()
            outcome.loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters(), _CLIP)
            optimiser.step()
            self._step += 1
            for name, part in outcome.parts.items():
                losses[name].append(float(part.detach()))
            if len(outcome.correct):
                losses["accuracy"].append(float(outcome.correct.float().mean()))
            last = self._step == stage.steps
            if self._step % _LOG_EVERY == 0 or last:
                self._seconds += time.monotonic() - begun
                begun = time.monotonic()
                self._log(stage, {name: float(np.mean(values)) for name, values in losses.items()})
                losses.clear()
            if stage.questions and (self._step % self._recipe.validate_every == 0 or last):
                self._log(stage, {"validation": self.validate()})
            if self._step % self._recipe.validate_every == 0 or time.monotonic() > end:
                self._save(optimiser)
            if time.monotonic() > end and not last:
                return False
        return True

    def _optimiser(self, stage: Stage) -> torch.optim.Optimizer:
        parameters = self._parameters()
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self._recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98))
        if self._saved is not None:
            optimiser.load_state_dict(self._saved)
            self._saved = None
        return optimiser

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [*self.model.parameters(), *self.head.parameters()]

    def _batches(self, stage: Stage) -> Iterator[Batch]:
        before = sum(s.steps * s.batch for s in self._recipe.stages[: self._stage])
        examples = Examples(
            "train",
            before + self._step * stage.batch,
            stage.batch,
            stage.steps - self._step,
            stage.questions,
            self._recipe,
            self._recipe.stretched,
        )
        loader = DataLoader(examples, batch_size=None, num_workers=self._workers, worker_init_fn=_one_thread)
        for batch in loader:
            yield batch.to(self._device)

    def _judge(self, batch: Batch, stage: Stage) -> Outcome:
        with torch.autocast(self._device.type, torch.bfloat16):
            return judge(self.model, self.head, batch, stage.dense, self._recipe.blind)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Accuracy on the validation split by kind of question, and over all."""
        self.model.eval()
        count = self._recipe.validation // _VALIDATION_BATCH
        right: dict[str, list[float]] = defaultdict(list)
        for batch in _plain(Examples("validation", 0, _VALIDATION_BATCH, count, 8, self._recipe, 0.0)):
            outcome = judge(self.model, None, batch.to(self._device), 0.0, self._recipe.blind)
            for kind, correct in zip(batch.kinds, outcome.correct.tolist(), strict=True):
                right[kind].append(correct)
                right["all"].append(correct)
        self.model.train()
        return {kind: float(np.mean(values)) for kind, values in sorted(right.items())}

    def _log(self, stage: Stage, values: dict[str, Any]) -> None:
        line = {"stage": stage.name, "step": self._step, "seconds": round(self._seconds), **values}
        with (self._out / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def _save(self, optimiser: torch.optim.Optimizer | None) -> None:
        state = {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimiser": None if optimiser is None else optimiser.state_dict(),
            "stage": self._stage,
            "step": self._step,
            "seconds": self._seconds,
        }
        write_atomic(self._out / CHECKPOINT, lambda partial: torch.save(state, partial))


def _plain(examples: Examples) -> Iterator[Batch]:
    return (examples[i] for i in range(len(examples)))


def _schedule(step: int, stage: Stage) -> float:
    """Share of the highest learning rate: up in a line, down along a cosine."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
