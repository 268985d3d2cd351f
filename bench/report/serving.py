"""The block about servers: whole requests of many clients, unpruned and pruned."""

from __future__ import annotations

from bench.e2e.methods import UNPRUNED
from bench.markdown import table
from bench.report.models import NOT_MEASURED, find
from bench.report.results import Result, Results
from bench.serving.presets import PRESETS

_HEAD = ["device", "clients", "server", "prompt tokens", "requests/s (least - most)", "gain"]
_HEAD += ["first token p50, s", "p95, s", "whole answer p50, s", "CPU s a request"]
_HEAD += ["KV cache used at most", "requests in a batch at most"]
_SECONDS = ("ttft_p50_s", "ttft_p95_s", "latency_p50_s", "cpu_s_per_request")
_ROOM = [
    "device",
    "server",
    "KV blocks of a request",
    "requests that fit",
    "maximum concurrency as vLLM prints it",
]


def served(results: Results) -> str:
    """Every preset: what clients see, and what the cache has room for."""
    parts = []
    for name, preset in PRESETS.items():
        found = [one for one in results.named(f"serving-{name}") if one.on_gpu == bool(preset.gpu_bytes)]
        nobody = "GPU" if preset.gpu_bytes else "CPU"
        lines = [line for one in found for line in _loads(one)]
        room = [line for one in found for line in _room(one)]
        lines = lines or [[nobody, *[NOT_MEASURED] * (len(_HEAD) - 1)]]
        room = room or [[nobody, *[NOT_MEASURED] * (len(_ROOM) - 1)]]
        said = [_said(one) for one in found]
        parts.append("\n\n".join([f"**{name}**", table(_HEAD, lines), table(_ROOM, room), *said]))
    return "\n\n".join(parts)


def _loads(result: Result) -> list[list[str]]:
    lines = []
    for row in sorted(result.data["rows"], key=lambda row: row["concurrency"]):  # servers stay in their order
        before = find(result, server=UNPRUNED, concurrency=row["concurrency"])
        rate = row["requests_per_s"]
        lines.append(
            [
                result.folder,
                str(row["concurrency"]),
                row["server"],
                str(row["prompt_tokens"]),
                f"{three(rate['median'])} ({three(rate['least'])} - {three(rate['most'])})",
                f"{rate['median'] / before['requests_per_s']['median']:.2f}x" if before else "",
                *(three(row[what]["median"]) for what in _SECONDS),
                f"{row['peak_cache']['median']:.0%}",
                f"{row['peak_running']['median']:.0f}",
            ]
        )
    return lines


def three(value: float) -> str:
    """With three digits that count, where there are no more before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _room(result: Result) -> list[list[str]]:
    """A line for each server; all loads have the same cache."""
    rows = {row["server"]: row for row in result.data["rows"]}
    return [
        [
            result.folder,
            name,
            str(row["blocks_per_request"]),
            str(row["requests_that_fit"]),
            f"{row['start_up_line']:.1f}x",
        ]
        for name, row in rows.items()
    ]


def _said(result: Result) -> str:
    """Where it is from, and what was served."""
    data = result.data
    vision, language = (data["parameters"][part] / 1e6 for part in ("vision", "language"))
    rounds = max((row["rounds"] for row in data["rows"]), default=0)
    note = f" **{data['note'][0].upper()}{data['note'][1:]}.**" if data["note"] else ""
    return (
        f"{str(result)[0].upper()}{str(result)[1:]}. LLaVA-1.5's layout, {data['image_tokens']} image tokens "
        f"of which pruning keeps {data['keep']}, {vision:.0f} M parameters on the vision side and "
        f"{language:.0f} M in the language model, {data['dtype']}, random; answers of "
        f"{data['answer_tokens']} tokens; medians of {rounds} rounds. vLLM's options: "
        f"`{data['options']}`.{note}"
    )
