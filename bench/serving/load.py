"""Clients of a server: each asks, reads the whole stream, and asks again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.serving import counters
from bench.serving.processes import cpu_seconds
from bench.serving.servers import Server, ServerError

if TYPE_CHECKING:
    from aiohttp import ClientSession

_TIMEOUT = 600.0
#: Seconds in which a server that broke off may end, so that its last words are there.
_ENDING = 2.0
_DATA = b"data: "


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        tokens: of it.
        prompt_tokens: as the server counts them.
        first_s: from the request to its first token.
        all_s: to its end.
    """

    tokens: tuple[int, ...]
    prompt_tokens: int
    first_s: float
    all_s: float


@dataclass(frozen=True)
class Burst:
    """Answers to a list of requests, in its order, and what they took.

    Attributes:
        seconds: from the first request to the last answer.
        cpu_seconds: of all processes of the server.
        cache: largest share of the KV cache seen in use.
        running: most requests seen in a batch.
    """

    replies: tuple[Reply, ...]
    seconds: float
    cpu_seconds: float
    cache: float
    running: int


def send(server: Server, bodies: Sequence[bytes], concurrency: int, *, answer: int, sample_s: float) -> Burst:
    """Have ``concurrency`` clients send all ``bodies``.

    Args:
        server: that is ready.
        bodies: requests, see :func:`bench.serving.pictures.body`.
        concurrency: clients.
        answer: tokens that each asks for.
        sample_s: seconds between looks at the server's counters.

    Raises:
        ServerError: it ended, or answered with an error, or with more or less than it was asked for.
        CounterError: its counters are none that we know.
    """
    burst = asyncio.run(_send(server, bodies, concurrency, sample_s))
    for reply in burst.replies:
        if len(reply.tokens) != answer:
            raise ServerError(f"the server {server.name!r} answered {len(reply.tokens)} of {answer} tokens")
    return burst


async def _send(server: Server, bodies: Sequence[bytes], concurrency: int, sample_s: float) -> Burst:
    import aiohttp

    replies: dict[int, Reply] = {}
    seen = [counters.Busy(0.0, 0)]
    left = iter(enumerate(bodies))
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=_TIMEOUT)
    ) as session:
        watching = asyncio.create_task(_watch(session, server, sample_s, seen))
        cpu, start = cpu_seconds(server.pid), time.perf_counter()
        clients = [asyncio.create_task(_client(session, server, left, replies)) for _ in range(concurrency)]
        try:
            await asyncio.gather(*clients)
            seconds, cpu = time.perf_counter() - start, cpu_seconds(server.pid) - cpu
        except (aiohttp.ClientError, asyncio.TimeoutError, ProcessLookupError) as error:
            await asyncio.sleep(_ENDING)
            server.check()
            raise ServerError(f"the server {server.name!r} broke off: {error!r}") from error
        finally:
            for task in (*clients, watching):
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            with contextlib.suppress(asyncio.CancelledError):
                await watching
    return Burst(
        tuple(replies[number] for number in range(len(bodies))),
        seconds,
        cpu,
        max(one.cache for one in seen),
        max(one.running for one in seen),
    )


async def _client(
    session: ClientSession, server: Server, left: Iterator[tuple[int, bytes]], replies: dict[int, Reply]
) -> None:
    for number, body in left:
        replies[number] = await _ask(session, server, body)


async def _ask(session: ClientSession, server: Server, body: bytes) -> Reply:
    start = time.perf_counter()
    first, prompt = None, None
    tokens: list[int] = []
    headers = {"Content-Type": "application/json"}
    async with session.post(f"{server.url}/v1/chat/completions", data=body, headers=headers) as answer:
        if answer.status != 200:
            said = (await answer.text())[:500]
            raise ServerError(f"the server {server.name!r} answered {answer.status}: {said}")
        async for line in answer.content:
            new, counted = parse(line)
            if new and first is None:
                first = time.perf_counter() - start
            tokens += new
            prompt = prompt if counted is None else counted
    everything = time.perf_counter() - start
    if first is None or prompt is None:
        raise ServerError(f"the server {server.name!r} sent no tokens, or did not count the prompt's")
    return Reply(tuple(tokens), prompt, first, everything)


def parse(line: bytes) -> tuple[list[int], int | None]:
    """New tokens, and the prompt's number of tokens where it is told, of one line of a stream.

    Raises:
        ServerError: the server says that it failed.
    """
    text = line.strip()
    if not text.startswith(_DATA) or text == _DATA + b"[DONE]":
        return [], None
    event: dict[str, Any] = json.loads(text[len(_DATA) :])
    if "error" in event:
        raise ServerError(f"a stream broke off: {event['error']}")
    tokens = [token for choice in event.get("choices", ()) for token in choice.get("token_ids") or ()]
    usage = event.get("usage")
    return tokens, None if usage is None else int(usage["prompt_tokens"])


async def _watch(session: ClientSession, server: Server, every: float, seen: list[counters.Busy]) -> None:
    import aiohttp

    while True:
        with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):  # clients notice the same
            async with session.get(server.url + counters.PATH) as answer:
                seen.append(counters.busy(await answer.text()))
        await asyncio.sleep(every)
