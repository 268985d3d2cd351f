"""What a server of vLLM tells of itself at ``/metrics``, in Prometheus' text format."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

#: Path of the counters on a server.
PATH = "/metrics"
_LINE = re.compile(r"(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)(?:\s+-?\d+)?")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_CACHE, _USED, _RUNNING = (
    "vllm:cache_config_info",
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
)


class CounterError(ValueError):
    """A counter that a server does not have: another vLLM than this code knows."""


@dataclass(frozen=True)
class Sample:
    """One line: ``name{label="..."} value``."""

    labels: dict[str, str]
    value: float


@dataclass(frozen=True)
class Busy:
    """What a server did at one moment.

    Attributes:
        cache: share of the KV cache in use.
        running: requests in its batch.
    """

    cache: float
    running: int


@dataclass(frozen=True)
class Cache:
    """Keys and values that a server has room for.

    Attributes:
        blocks: of all requests.
        block_size: tokens of each.
    """

    blocks: int
    block_size: int

    def of(self, tokens: int) -> int:
        """Blocks of a request of so many tokens, prompt and answer."""
        return -(-tokens // self.block_size)

    def fit(self, tokens: int) -> int:
        """Requests of so many tokens that there is room for at once."""
        return self.blocks // self.of(tokens)


def samples(text: str, name: str) -> list[Sample]:
    """All samples of one name.

    Raises:
        CounterError: there is none.
    """
    found = list(_samples(text, name))
    if not found:
        raise CounterError(
            f"the server reports no {name}: bench/serving/counters.py knows vLLM 0.32 and 0.33"
        )
    return found


def _samples(text: str, name: str) -> Iterator[Sample]:
    for line in text.splitlines():
        if line.startswith(name) and (match := _LINE.fullmatch(line.strip())) and match["name"] == name:
            yield Sample(dict(_LABEL.findall(match["labels"] or "")), float(match["value"]))


def busy(text: str) -> Busy:
    """The fullest engine's cache, and requests of all engines."""
    cache, running = (samples(text, name) for name in (_USED, _RUNNING))
    return Busy(max(one.value for one in cache), round(sum(one.value for one in running)))


def cache(text: str) -> Cache:
    """Of one engine.

    Raises:
        CounterError: it does not tell.
    """
    labels = samples(text, _CACHE)[0].labels
    try:
        return Cache(int(labels["num_gpu_blocks"]), int(labels["block_size"]))
    except (KeyError, ValueError) as error:
        raise CounterError(f"{_CACHE} tells no number of blocks, or no size: {labels}") from error
