"""A server of vLLM under load, unpruned and pruned: ``python -m bench.serving [--preset NAME] [--record]``.

Requests a second, time to the first token, CPU seconds, KV cache, with 1, 4 and 16 clients that ask about
pictures no cache has. Needs a Python that has vLLM, whose servers are started and ended here; ocvtp need not
be installed. Weights are random, since speed does not depend on them. Nothing is timed before the gate is
green.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.table import Table

from bench.harness import device_slug, provenance
from bench.micro.gates import GateError
from bench.record import ResultFile, Row, Rows, add_options, exit_code, folder_of
from bench.serving import gate
from bench.serving.contenders import contenders
from bench.serving.counters import CounterError
from bench.serving.folders import Folders, write
from bench.serving.measure import ask, measure, warm_up
from bench.serving.presets import PRESETS, Preset, rehearsal
from bench.serving.servers import ServerError, serving

_KEY = ("server", "concurrency")
NO_VLLM = (
    "bench.serving needs a Python that has vLLM, and this one has none. On a machine with a GPU: pip install "
    "vllm, into the environment of GPU_PYTHON or into another, then make gpu-serving SERVING_PYTHON=python. "
    "On a CPU: make test-serving builds build/vllm, then make serving"
)


def run(
    preset: Preset, device: torch.device, path: Path, *, commit: str | None, minutes: float, console: Console
) -> tuple[ResultFile, bool]:
    """Check, then measure every load that an earlier run of the same tree has left.

    Returns:
        The results so far, and whether they are complete.

    Raises:
        GateError: a server answers something else than it should.
        ServerError: one did not start, or ended.
    """
    deadline = time.monotonic() + 60 * minutes

    def say(what: str) -> None:
        console.print(what, highlight=False)

    with tempfile.TemporaryDirectory(prefix="ocvtp-serving-") as name:
        place = Path(name)
        say(f"{preset.name}: writing a model with random weights, made on {device_slug(device)}")
        folders = write(preset, place, device)
        those = contenders(preset.keep, folders.pruner)
        asked = gate.questions(preset, folders, those)
        say("starting servers: " + ", ".join(one.name for one in those))
        with serving(those, folders.model, preset.options, place, together=preset.together) as servers:
            by_name = {server.name: server for server in servers}
            checked = gate.check(
                asked, those, folders.image_tokens, lambda one, sent: ask(preset, by_name[one.name], sent)
            )
            for sentence in checked:
                say(f"checked: {sentence}")
            results = ResultFile(path, _head(preset, folders, checked, device, commit), _KEY)
            warm_up(preset, folders.side, servers)
            for load in preset.loads:
                known = ({"server": name, "concurrency": load.concurrency} for name in by_name)
                if all(results.has(row) for row in known):
                    continue
                if time.monotonic() > deadline:
                    return results, False
                rows = measure(preset, folders.side, servers, load, say)
                for row in rows:
                    results.add(row)
                show(preset.name, rows, console)
    return results, True


def _head(
    preset: Preset, folders: Folders, checked: Sequence[str], device: torch.device, commit: str | None
) -> Row:
    return {
        **provenance(device, commit),
        "vllm": vllm_version(),
        "preset": preset.name,
        "note": preset.note,
        "weights": "random",
        "dtype": preset.dtype,
        "image": [folders.side, folders.side],
        "image_tokens": folders.image_tokens,
        "keep": preset.keep,
        "answer_tokens": preset.answer,
        "options": " ".join(preset.options),
        "sample_s": preset.sample_s,
        "parameters": folders.parameters,
        "gate": list(checked),
    }


def has_vllm() -> bool:
    """Whether this Python has it. It is not imported."""
    return importlib.util.find_spec("vllm") is not None


def vllm_version() -> str:
    """Of the vLLM that is installed, by the distribution's own name if that is another."""
    names = importlib.metadata.packages_distributions().get("vllm", ["vllm"])
    name = "vllm" if "vllm" in names else names[0]
    version = importlib.metadata.version(name)
    return version if name == "vllm" else f"{version} ({name})"


def show(name: str, rows: Rows, console: Console) -> None:
    """A table of one load; ratios are of its first row."""
    first = rows[0]
    table = Table(
        "",
        "prompt",
        "requests/s",
        "",
        *("first, s", "p95", "all, s", "CPU s", "cache", "batch"),
        title=f"{name}: {first['concurrency']} at once, {first['rounds']} x {first['requests']} requests",
        caption="medians of rounds: p50 and p95 of the time to the first token, p50 of that to the last",
    )
    for row in rows:
        rate = row["requests_per_s"]
        table.add_row(
            row["server"],
            str(row["prompt_tokens"]),
            "{median:.2f} ({least:.2f}-{most:.2f})".format(**rate),
            f"{rate['median'] / first['requests_per_s']['median']:.2f}x",
            *(f"{row[what]['median']:.2f}" for what in ("ttft_p50_s", "ttft_p95_s", "latency_p50_s")),
            f"{row['cpu_s_per_request']['median']:.2f}",
            f"{row['peak_cache']['median']:.0%}",
            f"{row['peak_running']['median']:.0f}",
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; with ``--record`` also write. Exits with 3 if time ran out: run it again."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu-small")
    parser.add_argument(
        "--rehearse", action="store_true", help="on a tiny model and a CPU, to see that it runs"
    )
    add_options(parser)
    arguments = parser.parse_args(argv)
    if not has_vllm():
        raise SystemExit(NO_VLLM)
    preset, device = PRESETS[arguments.preset], torch.device(arguments.device)
    if arguments.rehearse:
        preset, device = rehearsal(preset), torch.device("cpu")
    _check_device(preset, device, parser)
    path = folder_of(arguments) / f"serving-{preset.name}.json"
    console = Console()
    before = signal.signal(signal.SIGTERM, _leave)  # an exception, on whose way servers are ended
    try:
        results, complete = run(
            preset, device, path, commit=arguments.commit, minutes=arguments.minutes, console=console
        )
    except GateError as error:
        raise SystemExit(f"gate failed at {preset.name}: {error}") from error
    except (ServerError, CounterError) as error:
        raise SystemExit(str(error)) from error
    finally:
        signal.signal(signal.SIGTERM, before)
    console.print(f"{len(results.rows)} rows in {path}", highlight=False, soft_wrap=True)
    return exit_code(complete, console)


def _check_device(preset: Preset, device: torch.device, parser: argparse.ArgumentParser) -> None:
    if preset.gpu_bytes and device.type == "cpu":
        parser.error(f"{preset.name} is built at its true size and needs a GPU; on a CPU: --preset cpu-small")
    if not preset.gpu_bytes and device.type != "cpu":
        parser.error(f"{preset.name} is for a vLLM on a CPU; on a GPU: --preset llava-1.5-7b")
    if preset.gpu_bytes:
        free, _ = torch.cuda.mem_get_info(device)
        if free < preset.gpu_bytes:
            needed = preset.gpu_bytes / 1e9
            parser.error(
                f"{preset.name} needs {needed:.0f} GB of free GPU memory; there are {free / 1e9:.0f}"
            )


def _leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
