"""``--model ocvtp``: any Hugging Face model that ocvtp prunes, in lmms-eval's chat protocol."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm

from ocvtp.harness.answering import Answer, Answerer, ignored, samples
from ocvtp.harness.arguments import Arguments
from ocvtp.harness.conversations import Conversation, digest, prepared, text_of
from ocvtp.harness.journal import Journal
from ocvtp.harness.loading import load_model, load_processor, plan, prune
from ocvtp.harness.record import deciding, record_of
from ocvtp.harness.tally import Tally

#: Of each task, answered questions that a resumed run compares, so that other data is not taken for the same.
_COMPARED = 8


@dataclass
class Counts(TokenCounts):
    """Lands in every line of ``--log_samples``. ``input_tokens`` is what the language model read."""

    images: int = 0
    vision_tokens: int = 0
    kept_vision_tokens: int = 0
    vision_tokens_in_layers: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        own = ("images", "vision_tokens", "kept_vision_tokens", "vision_tokens_in_layers")
        return {**super().to_dict(), **{name: getattr(self, name) for name in own}}


class Ocvtp(lmms):
    """See the module, and :class:`~ocvtp.harness.arguments.Arguments` for what it takes.

    Attributes:
        accelerator: of the processes, for lmms-eval.
        device: of this process's model.
        report: what pruning did to the model; ``None``: it is as it was.
    """

    is_simple = False

    def __init__(self, **given: Any) -> None:
        super().__init__()
        # lmms-eval tells the number of processes later, from the same place.
        with _ending_all(int(os.environ.get("WORLD_SIZE", "1"))):
            self._load(Arguments.from_strings(given))

    def _load(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.accelerator = Accelerator()
        alone = self.accelerator.num_processes == 1
        if arguments.device_map is not None and not alone:
            raise ValueError(
                f"device_map spreads a model from one process, and there are {self.accelerator.num_processes}"
            )
        named = arguments.device if alone else None
        self.device = self.accelerator.device if named is None else torch.device(named)
        said = arguments.system_prompt
        self._system = None if said is None else text_of("system_prompt", said)
        processor = load_processor(arguments, self._system)
        self._mean = processor.image_processor.image_mean if arguments.pad_to_square else None
        config, chooser = plan(arguments, processor)
        self.model = load_model(arguments, config, self.device)
        self.report = prune(arguments, self.model, chooser)
        self._record = record_of(arguments, self.model, chooser, self.report, self._system, processor)
        self._timed_on = f"{self._record['device']}, {arguments.batch_size} at once"
        self._answerer: Answerer | None = Answerer(
            self.model, processor, arguments.max_new_tokens, self._timed_on
        )
        self._journal = None
        if arguments.resume is not None:
            self._journal = Journal(arguments.resume, deciding(self._record))
        self._tally = Tally()
        self._figures: dict[str, int | float] | None = None
        logger.info("ocvtp: not pruned" if self.report is None else str(self.report))

    @property
    def record(self) -> dict[str, Any]:
        """What this run is, JSON-ready; ``measured`` is there once all processes have answered."""
        return {**self._record, "measured": self._figures}

    @property
    def batch_sizes(self) -> dict[str, dict[str, Any]]:
        """:attr:`record`, where lmms-eval puts it into the results as it is: 0.7 asks a model for no more."""
        return {"ocvtp": self.record}

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer per request, in their order."""
        with _ending_all(self.world_size):
            return self._results(requests)

    def _results(self, requests: list[Instance]) -> list[GenerationResult]:
        keys = _keys(requests)
        # lmms-eval fills processes up with copies, which count nowhere.
        own = {key for key, request in zip(keys, requests, strict=True) if not _is_copy(request)}
        waiting = dict(zip(keys, requests, strict=True))
        _check_settings(waiting.values(), resumable=self._journal is not None)
        found = self._restored(waiting)
        for key, answer in found.items():
            if key in own:
                self._tally.add(answer, restored=True, timed=answer.timed_on == self._timed_on)
        asked = {key: request for key, request in waiting.items() if key not in found}
        with tqdm(total=len(waiting), initial=len(found), disable=self.rank != 0, desc="ocvtp") as bar:
            for batch in self._batches(asked):
                answers = self._answered([asked[key] for key in batch])
                pairs = list(zip(batch, answers, strict=True))
                ours = [(key, answer) for key, answer in pairs if key in own]
                if self._journal is not None:
                    self._journal.add(self.rank, [(key, asdict(answer)) for key, answer in ours])
                found.update(pairs)
                for _, answer in ours:
                    self._tally.add(answer)
                bar.update(len(batch))
        return [_result(found[key]) for key in keys]

    def _restored(self, waiting: Mapping[str, Instance]) -> dict[str, Answer]:
        """Answers of an earlier run, if it was asked the same.

        Raises:
            ValueError: a task's words or pictures have changed since; told by a few of each task.
        """
        if self._journal is None:
            return {}
        before = {key: self._journal.get(key) for key in waiting}
        try:
            found = {key: Answer(**answer) for key, answer in before.items() if answer is not None}
        except TypeError as error:
            raise ValueError(
                f"resume: answers of another version of ocvtp ({error}): give another folder"
            ) from error
        by_task: dict[str, list[str]] = defaultdict(list)
        for key in found:
            by_task[str(waiting[key].args[4])].append(key)
        for task, keys in by_task.items():
            for key in keys[:: max(1, len(keys) // _COMPARED)]:
                if digest(self._conversation(waiting[key])) != found[key].asked:
                    raise ValueError(
                        f"resume: the questions of {task}, words or pictures, are not those that were "
                        "answered: give another folder"
                    )
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("ocvtp answers tasks of one round")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: lmms-eval has no such tasks for chat models."""
        raise NotImplementedError("ocvtp answers tasks that generate text")

    def clean(self) -> None:
        """Free the model. Every process comes here once it has answered, so they add up their figures."""
        with _ending_all(self.world_size):
            self._add_up()
        if self._journal is not None:
            self._journal.close()
        self._answerer = None
        super().clean()

    def _add_up(self) -> None:
        parts: list[Any] = [self._tally]
        if self.world_size > 1 and torch.distributed.is_initialized():
            parts = [None] * self.world_size
            torch.distributed.all_gather_object(parts, self._tally)
            atexit.register(_leave)
        whole = Tally.of(parts)
        self._figures = whole.figures()
        if self._figures is not None and self.rank == 0:
            speed = whole.timed_tokens / whole.seconds if whole.seconds else 0.0
            # The name makes lmms-eval work out the latency.
            latency = {"num_requests": whole.timed} if whole.timed else {}
            log_metrics(whole.seconds, whole.timed_tokens, speed, {**self._figures, **latency})

    def _batches(self, asked: Mapping[str, Instance]) -> Iterator[list[str]]:
        """Requests that can be answered together: those with the same generation settings."""
        groups: dict[str, list[str]] = defaultdict(list)
        for key, request in asked.items():
            groups[json.dumps(request.args[2], sort_keys=True, default=str)].append(key)
        size = self.arguments.batch_size
        for keys in groups.values():
            for start in range(0, len(keys), size):
                yield keys[start : start + size]

    def _answered(self, requests: list[Instance]) -> list[Answer]:
        assert self._answerer is not None
        try:
            conversations = [self._conversation(request) for request in requests]
            return self._answerer.answer(conversations, requests[0].args[2])
        except Exception:
            which = ", ".join(
                f"{task} {split} {number}" for *_, number, task, split in (r.args for r in requests)
            )
            logger.error(f"ocvtp: failed at {which} (task, split, number of the document)")
            raise

    def _conversation(self, request: Instance) -> Conversation:
        _, to_messages, _, number, task, split = request.args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][number]))
        return prepared(messages.to_hf_messages(), self._system, self._mean)


def _leave() -> None:
    """End the group of processes, which lmms-eval doesn't.

    Its threads let go of tensors, and one that does so while Python is ending aborts a process that is done.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _ending_all(processes: int) -> Iterator[None]:
    """Around what may fail in one of several processes: its launcher is to end the others, which wait for it.

    lmms-eval's command catches an ``Exception`` and exits with 0, of which no launcher takes notice.
    """
    try:
        yield
    except Exception as error:
        if processes == 1:
            raise
        logger.exception("ocvtp: this process failed, so the run ends")
        raise SystemExit(1) from error


def _keys(requests: list[Instance]) -> list[str]:
    """Of each request: which question, in which words, under which settings, and which repetition of it."""
    seen: Counter[str] = Counter()
    keys = []
    for request in requests:
        words, _, settings, number, task, split = request.args
        digest = hashlib.sha256(str(words).encode()).hexdigest()[:16]
        key = json.dumps([task, split, number, request.idx, digest, settings], sort_keys=True, default=str)
        copied = _is_copy(request)
        keys.append(f"{key} {max(seen[key] - copied, 0)}")
        seen[key] += not copied
    return keys


def _is_copy(request: Instance) -> bool:
    """Whether lmms-eval put it there to have as many requests in every process."""
    return bool((request.metadata or {}).get("__padding_only__"))


def _check_settings(requests: Iterable[Instance], *, resumable: bool) -> None:
    """Warn of generation settings that reach nobody; raise ``ValueError`` where answers can't be resumed."""
    lost: dict[str, set[str]] = defaultdict(set)
    for request in requests:
        settings, task = request.args[2], str(request.args[4])
        lost[task].update(ignored(settings))
        if resumable and samples(settings):
            raise ValueError(
                f"resume: {task} draws its answers, and a resumed run would draw others: leave resume out"
            )
    for task, names in lost.items():
        if names:
            logger.warning(f"ocvtp: {task} asks for {', '.join(sorted(names))}, which is not handed on")


def _result(answer: Answer) -> GenerationResult:
    counts = Counts(
        input_tokens=answer.input_tokens,
        output_tokens=answer.output_tokens,
        images=answer.images,
        vision_tokens=answer.vision_tokens,
        kept_vision_tokens=answer.kept_vision_tokens,
        vision_tokens_in_layers=answer.vision_tokens_in_layers,
    )
    return GenerationResult(answer.text, counts)
