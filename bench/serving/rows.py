"""From bursts to rows of results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.serving.counters import Cache
from bench.serving.load import Burst
from bench.serving.presets import Load

#: What is taken of every round.
Figures = dict[str, float]


def figures(burst: Burst) -> Figures:
    """Of one round of one server."""
    first = [reply.first_s for reply in burst.replies]
    everything = [reply.all_s for reply in burst.replies]
    count = len(burst.replies)
    return {
        "requests_per_s": count / burst.seconds,
        "ttft_p50_s": percentile(first, 50),
        "ttft_p95_s": percentile(first, 95),
        "latency_p50_s": percentile(everything, 50),
        "cpu_s_per_request": burst.cpu_seconds / count,
        "peak_cache": burst.cache,
        "peak_running": float(burst.running),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    """With what lies between two values taken on the line between them."""
    return float(np.percentile(values, percent))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Of a few rounds: the median one, the least and the most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def row(
    name: str, load: Load, bursts: Sequence[Burst], cache: Cache, *, answer: int, longest: int
) -> dict[str, Any]:
    """One server at one load.

    Args:
        name: of the server.
        load: clients and requests.
        bursts: one of each round.
        cache: of the server.
        answer: tokens of every answer.
        longest: tokens that the server lets a request have.
    """
    rounds = [figures(burst) for burst in bursts]
    prompt = bursts[0].replies[0].prompt_tokens
    return {
        "server": name,
        "concurrency": load.concurrency,
        "requests": load.requests,
        "rounds": len(bursts),
        "prompt_tokens": prompt,
        **{what: spread([one[what] for one in rounds]) for what in rounds[0]},
        "blocks": cache.blocks,
        "block_size": cache.block_size,
        "blocks_per_request": cache.of(prompt + answer),
        "requests_that_fit": cache.fit(prompt + answer),
        # What vLLM prints when it starts: it knows only how long a request may become.
        "start_up_line": cache.blocks / cache.of(longest),
    }
