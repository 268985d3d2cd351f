"""Rounds of all servers in turns, so that a slow spell of the machine hits all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bench.record import Rows
from bench.serving.gate import Answered
from bench.serving.load import Burst, send
from bench.serving.pictures import body, picture
from bench.serving.presets import Load, Preset
from bench.serving.rows import row
from bench.serving.servers import Server


def ask(preset: Preset, server: Server, bodies: Sequence[bytes]) -> Answered:
    """One request after the other."""
    burst = send(server, bodies, 1, answer=preset.answer, sample_s=preset.sample_s)
    return Answered([reply.tokens for reply in burst.replies], [r.prompt_tokens for r in burst.replies])


def bodies(preset: Preset, side: int, load: Load, series: int) -> list[bytes]:
    """Requests with pictures that those of no other load or ``series`` show."""
    first = 10_000 * load.concurrency + 1000 * series
    return [
        body(picture(first + number, side), preset.question, preset.answer) for number in range(load.requests)
    ]


def warm_up(preset: Preset, side: int, servers: Iterable[Server]) -> None:
    """Have every server do everything once, untimed."""
    sent = bodies(preset, side, preset.warm_up, preset.rounds)
    for server in servers:
        send(server, sent, preset.warm_up.concurrency, answer=preset.answer, sample_s=preset.sample_s)


def measure(
    preset: Preset, side: int, servers: Sequence[Server], load: Load, say: Callable[[str], None]
) -> Rows:
    """A row for each server: every round sends the same requests to one after the other.

    Args:
        preset: what is measured.
        side: of a picture, in pixels.
        servers: that are warm.
        load: clients and requests.
        say: is told of each round.
    """
    bursts: dict[str, list[Burst]] = {server.name: [] for server in servers}
    for round_ in range(preset.rounds):
        sent = bodies(preset, side, load, round_)
        for server in servers:
            burst = send(server, sent, load.concurrency, answer=preset.answer, sample_s=preset.sample_s)
            bursts[server.name].append(burst)
            rate = load.requests / burst.seconds
            say(f"{load.concurrency} at once, round {round_ + 1}, {server.name}: {rate:.2f} requests/s")
    return [
        row(
            server.name,
            load,
            bursts[server.name],
            server.cache(),
            answer=preset.answer,
            longest=server.longest(),
        )
        for server in servers
    ]
