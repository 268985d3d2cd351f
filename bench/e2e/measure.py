"""Methods in one setting, timed in turns."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import StoppingCriteriaList

from bench.e2e.captured import Recorder, captured_prefill, record_graph
from bench.e2e.memory import cache_bytes, extra_bytes, held_bytes
from bench.e2e.methods import Method, Runner
from bench.e2e.presets import Cell
from bench.e2e.prompts import Inputs
from bench.e2e.watch import LANGUAGE_MODEL, TokenClock, Watch, synchronize
from bench.harness import summarise
from bench.record import Row, Rows
from ocvtp.vlm.encode.timing import STAGES


@dataclass
class Samples:
    """Of one method.

    Attributes:
        first: milliseconds to the first token.
        decoding: tokens per second after it, of all prompts together.
        stages: milliseconds, by stage.
        peak: bytes, weights among them.
        cache: bytes of keys and values of one token of every prompt.
        prompt_tokens: that the language model read of each prompt.
    """

    first: list[float] = field(default_factory=list)
    decoding: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    peak: int = 0
    cache: int = 0
    prompt_tokens: int = 0

    def saw(self, watch: Watch) -> None:
        """Add what was watched."""
        self.prompt_tokens = watch.prompt_tokens
        for name, milliseconds in watch.stages.items():
            self.stages[name].append(milliseconds)


def measure(
    cell: Cell,
    inputs: Inputs,
    methods: Mapping[str, Method],
    *,
    decode_tokens: int,
    rounds: int,
    calls: int,
    record: Recorder = record_graph,
) -> Rows:
    """One row for every method.

    Every round visits all methods, so that a slow spell of the machine hits all of them alike. On a CPU the
    stages are read off the timed calls themselves; on a GPU, where that needs synchronisation, off others.

    Args:
        cell: the setting; its ``batch`` and ``text_tokens`` are those of ``inputs``.
        inputs: as a processor makes them.
        methods: by name.
        decode_tokens: after the first.
        rounds: of all methods; with a compiled decoder one, since visits in turns would compile it anew.
        calls: timed in each round.
        record: for captured prefill.
    """
    device = inputs["input_ids"].device
    gpu = device.type == "cuda"
    rounds = 1 if cell.mode == "static cache" else rounds
    samples = {name: Samples() for name in methods}
    for number in range(rounds):
        for name, method in methods.items():
            with method.active() as runner, _prefilling(cell, runner, record):
                call = _Call(cell, runner, inputs, decode_tokens, samples[name])
                if gpu:
                    for _ in range(3):  # compile, record, replay
                        call.run()
                if number == 0:
                    held = held_bytes(device, runner.model)
                    samples[name].peak = held + extra_bytes(device, call.run if gpu else call.timed)
                for _ in range(calls - (number == 0 and not gpu)):
                    call.timed()
                if gpu:
                    call.watched()
    return [_row(cell, methods[name], of) for name, of in samples.items()]


def _prefilling(cell: Cell, runner: Runner, record: Recorder) -> contextlib.AbstractContextManager[object]:
    if cell.mode != "captured prefill":
        return contextlib.nullcontext()
    return captured_prefill(runner.model, record)


class _Call:
    """One prompt, and some tokens of its answer."""

    def __init__(
        self, cell: Cell, runner: Runner, inputs: Inputs, decode_tokens: int, samples: Samples
    ) -> None:
        self._runner, self._inputs, self._tokens, self._samples = runner, inputs, decode_tokens, samples
        self._device = inputs["input_ids"].device
        self._captured = cell.mode == "captured prefill"
        self._options = {"cache_implementation": "static"} if cell.mode == "static cache" else {}

    def run(self) -> tuple[list[float], Any]:
        """Seconds until each new token, and the cache."""
        if self._captured:
            synchronize(self._device)
            start = time.perf_counter()
            output = self._runner.forward(self._inputs)
            output.logits[:, -1].argmax(dim=-1).tolist()
            return [time.perf_counter() - start], output.past_key_values
        clock = TokenClock(self._device)
        output = self._runner.generate(
            self._inputs,
            max_new_tokens=1 + self._tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
            **self._options,
        )
        return clock.seconds, output.past_key_values

    def timed(self) -> None:
        """Run, and add to the samples; on a CPU with the stages."""
        if self._device.type == "cuda":
            seconds, cache = self.run()
        else:
            with self._runner.watching() as watch:
                seconds, cache = self.run()
            self._samples.saw(watch)
        self._samples.first.append(1e3 * seconds[0])
        if len(seconds) > 1:
            batch = len(self._inputs["input_ids"])
            self._samples.decoding.append(batch * (len(seconds) - 1) / (seconds[-1] - seconds[0]))
        self._samples.cache = cache_bytes(cache)

    def watched(self) -> None:
        """Run for the stages alone."""
        with self._runner.watching() as watch:
            self._runner.forward(self._inputs)
        self._samples.saw(watch)


def setting(cell: Cell, method: Method) -> Row:
    """What a row is of."""
    return {
        "method": method.name,
        "mode": cell.mode,
        "batch": cell.batch,
        "text_tokens": cell.text_tokens,
        "keep": method.keep,
    }


def _row(cell: Cell, method: Method, samples: Samples) -> Row:
    stages = {name: summarise(values).to_dict() for name, values in samples.stages.items()}
    return {
        **setting(cell, method),
        "prompt_tokens": round(samples.prompt_tokens - method.dropped),
        "ttft_ms": summarise(samples.first).to_dict(),
        "prefill_ms": stages.get(LANGUAGE_MODEL),
        "decode_tokens_per_s": summarise(samples.decoding).median if samples.decoding else None,
        "vision_ms": {name: stages[name] for name in STAGES if name in stages},
        "peak_bytes": samples.peak,
        "kv_bytes": round(samples.cache * (samples.prompt_tokens - method.dropped)),
    }
