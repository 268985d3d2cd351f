"""The command line. Every command checks what is cheap to check before it loads anything."""

from __future__ import annotations

import enum
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ocvtp import __version__
from ocvtp.commands.errors import told_plainly
from ocvtp.commands.loading import DEFAULT_KEEP

app = typer.Typer(
    help="Object-centric vision-token pruning for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _at_home(given: Any) -> Any:
    """``~`` spelled out: a shell does not do that in ``--out=~/x.png``, nor inside quotes."""
    return type(given)(os.path.expanduser(given))


ModelOption = Annotated[
    str, typer.Option(help="Model folder, or Hub id such as llava-hf/llava-1.5-7b-hf.", callback=_at_home)
]
PrunerOption = Annotated[
    str,
    typer.Option(
        help="Pruner folder, Hub id, or official weights file. Official weights don't tell the encoder layer "
        "they were trained on: 8 is assumed, unless --layer says otherwise.",
        callback=_at_home,
    ),
]
LayerOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Encoder layer, counted from 0, that official weights were trained on. Other pruners tell.",
    ),
]
KeepOption = Annotated[int, typer.Option(help="Image tokens to keep per image.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the pruner's slots.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ImageArgument = Annotated[Path, typer.Argument(help="The photograph.", show_default=False, callback=_at_home)]


class Positions(str, enum.Enum):
    """How the shortened prompt is numbered."""

    auto = "auto"
    compact = "compact"
    original = "original"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ocvtp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def prune(
    image: ImageArgument,
    model: ModelOption,
    pruner: PrunerOption,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "Describe this image.",
    keep: KeepOption = DEFAULT_KEEP,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    positions: Annotated[Positions, typer.Option(help="Positions of the kept tokens.")] = Positions.auto,
    layer: LayerOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Ask a model about an image with most of its tokens left out, and see how long each stage takes."""
    from ocvtp.commands import prune as command

    with told_plainly():
        result = command.run(
            image,
            model=model,
            pruner=pruner,
            keep=keep,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            device=device,
            dtype=dtype,
            positions=positions.value,
            layer=layer,
            seed=seed,
            console=Console(stderr=True),
        )
        if as_json:
            typer.echo(json.dumps(result.to_dict(), indent=1))
        else:
            command.show(result, Console())


@app.command()
def visualize(
    image: ImageArgument,
    model: ModelOption,
    pruner: PrunerOption,
    keep: KeepOption = DEFAULT_KEEP,
    out: Annotated[Path, typer.Option(help="The PNG to write.", callback=_at_home)] = Path("overlay.png"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    layer: LayerOption = None,
    seed: SeedOption = 0,
) -> None:
    """Draw which patches of an image are kept, and the slot each patch belongs to."""
    from ocvtp.commands import visualize as command

    with told_plainly():
        command.run(
            image,
            model=model,
            pruner=pruner,
            keep=keep,
            out=out,
            device=device,
            dtype=dtype,
            layer=layer,
            seed=seed,
            console=Console(stderr=True),
        )
        typer.echo(f"wrote {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The overlay's folder.", callback=_at_home)] = Path("ocvtp-demo"),
    keep: KeepOption = DEFAULT_KEEP,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each kind.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default all.")] = None,
) -> None:
    """Prune a photograph end to end with a random LLaVA-1.5-shaped model, and time it."""
    from ocvtp.commands import demo as command

    with told_plainly():
        command.run(out=out, keep=keep, repeats=repeats, threads=threads, console=Console())


@app.command()
def env(as_json: JsonOption = False) -> None:
    """Print versions, devices, and what will run."""
    from ocvtp.commands.env import collect

    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    Console().print(table)


def main() -> None:
    """The ``ocvtp`` console command."""
    app()


if __name__ == "__main__":
    main()
