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
from ocvtp.commands.dropped import Wishes
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


def _at_home_if_given(given: Any) -> Any:
    return None if given is None else _at_home(given)


class Merge(str, enum.Enum):
    """Where dropped tokens are averaged into kept ones."""

    auto = "auto"
    off = "off"
    projected = "projected"
    features = "features"


ModelOption = Annotated[
    str, typer.Option(help="Model folder, or Hub id such as llava-hf/llava-1.5-7b-hf.", callback=_at_home)
]
_PRUNER = (
    "Pruner folder, Hub id, or official weights file; or farthest_point, greedy_dpp, attention, random or "
    "grid, which need no training. Official weights don't tell the encoder layer they were trained on: 8 is "
    "assumed, unless --layer says otherwise."
)
_AS_APPLY = "as ocvtp.apply"
PrunerOption = Annotated[str, typer.Option(help=_PRUNER, callback=_at_home)]
PrunerOrDefaultOption = Annotated[
    str | None, typer.Option(help=_PRUNER, callback=_at_home_if_given, show_default=_AS_APPLY)
]
LayerOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Encoder layer, counted from 0, that official weights were trained on. Other pruners tell.",
    ),
]
KeepOption = Annotated[int, typer.Option(help="Image tokens to keep per image.")]


def _budget(value: str | float) -> int | float:
    """``64`` is a number of tokens, ``0.25`` a share of them."""
    try:
        return float(value) if "." in str(value) else int(value)
    except ValueError as error:
        raise typer.BadParameter(
            f"{value!r} is neither a number of tokens nor a share such as 0.25"
        ) from error


BudgetOption = Annotated[
    float,
    typer.Option(
        parser=_budget,
        metavar="<number or share>",
        help="Image tokens to keep per image: a number, or a share such as 0.25.",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the pruner's slots.")]
RefineOption = Annotated[
    int,
    typer.Option(min=0, help="Rounds that move kept tokens to where they cover more; 0 as published."),
]
MergeOption = Annotated[
    Merge | None,
    typer.Option(
        help="What becomes of dropped tokens: off throws them away; projected and features average them into "
        "the nearest kept one, after the projector or before it; auto takes projected wherever that can be.",
        show_default=_AS_APPLY,
    ),
]
WeighOption = Annotated[
    bool | None,
    typer.Option(
        "--weigh/--no-weigh",
        help="Tell the language model how many tokens each kept one stands for (proportional attention).",
        show_default=_AS_APPLY,
    ),
]
FeaturesOption = Annotated[
    str | None,
    typer.Option(
        metavar="<early, consumed or layer>",
        help="For farthest_point and greedy_dpp: the encoder layer whose features they compare: early is a "
        "third of the way up, consumed is the one that the language model reads; or a number, from 0.",
        show_default=_AS_APPLY,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
EncoderOption = Annotated[
    str,
    typer.Option(
        help="Folder or Hub id of a vision encoder, or of a vision-language model that has one.",
        callback=_at_home,
    ),
]
ReadLayerOption = Annotated[
    int, typer.Option(min=0, help="Encoder layer, counted from 0, whose output the pruner reads.")
]
CropsOption = Annotated[
    int, typer.Option(min=1, help="Records of each image: the whole, then random squares of it.")
]
ImagesArgument = Annotated[
    Path,
    typer.Argument(help="Folder of images, read with its subfolders.", show_default=False, callback=_at_home),
]
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


def _wishes(merge: Merge | None, weigh: bool | None, features: str | None = None) -> Wishes:
    return Wishes(None if merge is None else merge.value, weigh, features)


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
    pruner: PrunerOrDefaultOption = None,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "Describe this image.",
    keep: BudgetOption = DEFAULT_KEEP,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    positions: Annotated[Positions, typer.Option(help="Positions of the kept tokens.")] = Positions.auto,
    layer: LayerOption = None,
    seed: SeedOption = 0,
    refine: RefineOption = 0,
    merge: MergeOption = None,
    weigh: WeighOption = None,
    features: FeaturesOption = None,
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
            refine=refine,
            wishes=_wishes(merge, weigh, features),
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
    keep: BudgetOption = DEFAULT_KEEP,
    out: Annotated[Path, typer.Option(help="The PNG to write.", callback=_at_home)] = Path("overlay.png"),
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    layer: LayerOption = None,
    seed: SeedOption = 0,
    refine: RefineOption = 0,
    merge: MergeOption = None,
    weigh: WeighOption = None,
    features: FeaturesOption = None,
) -> None:
    """Draw which patches of an image are kept, which of them stands for each patch, and each patch's slot."""
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
            refine=refine,
            wishes=_wishes(merge, weigh, features),
            console=Console(stderr=True),
        )
        typer.echo(f"wrote {out}")


@app.command()
def features(
    images: ImagesArgument,
    encoder: EncoderOption,
    out: Annotated[Path, typer.Option(help="Folder to store them in; resumed if begun.", callback=_at_home)],
    layer: ReadLayerOption = 8,
    crops: CropsOption = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images the encoder sees at once.")] = 8,
    shard_mb: Annotated[int, typer.Option(min=1, help="Megabytes of one file.")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="First so many images only.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    side: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels along a picture's side, for models that see any size (Qwen-VL)."),
    ] = None,
) -> None:
    """Store what a vision encoder makes of a folder of images, to train a pruner on."""
    from ocvtp.commands import features as command

    with told_plainly():
        command.run(
            images,
            encoder=encoder,
            layer=layer,
            out=out,
            crops=crops,
            batch=batch,
            shard_mb=shard_mb,
            limit=limit,
            device=device,
            dtype=dtype,
            side=side,
            console=Console(stderr=True),
        )


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; resumed if begun.", callback=_at_home)],
    features: Annotated[
        Path | None, typer.Option(help="What `ocvtp features` stored.", callback=_at_home_if_given)
    ] = None,
    validation_features: Annotated[
        Path | None,
        typer.Option(
            help="Held-out features; default: a share of the photographs.", callback=_at_home_if_given
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Folder of images to train on without storing features.", callback=_at_home_if_given
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="With --images: folder or Hub id of the encoder.", callback=_at_home_if_given),
    ] = None,
    layer: ReadLayerOption = 8,
    crops: CropsOption = 1,
    config: Annotated[
        Path | None,
        typer.Option(
            help='JSON file {"recipe": {...}, "pruner": {...}}; options here win.', callback=_at_home_if_given
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the images [30].")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images of a step, of all processes [12].")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="AdamW's highest [0.001].")] = None,
    slots: Annotated[str | None, typer.Option(help="Numbers of slots to draw from [16,32,64,128].")] = None,
    validation_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Of the photographs, to hold out [0.05].")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Epochs without improvement before it stops [5].")
    ] = None,
    autocast: Annotated[str | None, typer.Option(help="none (the default), bf16 or fp16.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of everything random [0].")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget the run that --out holds.")] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="With --images: of the encoder.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Processes that read features ahead.")] = 0,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between rows of metrics.")] = 10,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 200,
) -> None:
    """Train a pruner. Several GPUs: accelerate launch -m ocvtp.cli train ..."""
    from ocvtp.commands import train as command

    with told_plainly():
        flags = {
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "slots": command.read_slots(slots),
            "validation_share": validation_share,
            "patience": patience,
            "autocast": autocast,
            "seed": seed,
        }
        command.run(
            out,
            features=features,
            validation_features=validation_features,
            images=images,
            encoder=encoder,
            layer=layer,
            crops=crops,
            config=config,
            recipe_flags={name: value for name, value in flags.items() if value is not None},
            fresh=fresh,
            device=device,
            dtype=dtype,
            workers=workers,
            log_every=log_every,
            save_every=save_every,
            console=Console(stderr=True),
        )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The overlays' folder.", callback=_at_home)] = Path("ocvtp-demo"),
    image: Annotated[
        Path | None,
        typer.Option(help="Ask the small model about this picture.", callback=_at_home_if_given),
    ] = None,
    question: Annotated[str | None, typer.Option(help="Ask the small model this.")] = None,
    speed: Annotated[
        bool | None,
        typer.Option("--speed/--no-speed", help="Time the large model; default: unless you ask something."),
    ] = None,
    keep: KeepOption = DEFAULT_KEEP,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each kind.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default all.")] = None,
) -> None:
    """Ask a small trained model before and after pruning, then time a large one of random weights."""
    from ocvtp.commands import demo as command

    with told_plainly():
        command.run_all(
            out=out,
            image=image,
            question=question,
            speed=speed,
            keep=keep,
            repeats=repeats,
            threads=threads,
            console=Console(),
        )


class Newlines(str, enum.Enum):
    """Which newlines of a packed image stay."""

    last = "last"
    all = "all"


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Model folder, or Hub id. vLLM's own options follow it.",
            callback=_at_home,
            show_default=False,
        ),
    ],
    keep: BudgetOption = DEFAULT_KEEP,
    pruner: PrunerOrDefaultOption = None,
    layer: LayerOption = None,
    pruner_seed: SeedOption = 0,
    refine: RefineOption = 0,
    merge: MergeOption = None,
    features: FeaturesOption = None,
    newlines: Annotated[
        Newlines, typer.Option(help="LLaVA-NeXT and LLaVA-OneVision: which newlines of an image stay.")
    ] = Newlines.last,
    print_only: Annotated[
        bool, typer.Option("--print", help="Print the command, and don't run it. Needs no vLLM.")
    ] = False,
) -> None:
    """Serve a model with vLLM's OpenAI server, most of its image tokens left out.

    Options that are not listed here go to vLLM as they are: --tensor-parallel-size 2, --port 8000 and so on.
    """
    import shlex

    from ocvtp.commands import serve as command

    with told_plainly():
        wishes = _wishes(merge, None, features)
        given = {"pruner": pruner, "layer": layer, **wishes.options()}
        unusual = {"seed": (pruner_seed, 0), "refine": (refine, 0), "newlines": (newlines.value, "last")}
        settings = {
            "keep": keep,
            **{name: value for name, value in given.items() if value is not None},
            **{name: value for name, (value, usual) in unusual.items() if value != usual},
        }
        words = command.words(model, settings, context.args)
        if not print_only:
            command.check_installed()
        typer.echo(shlex.join(words))
        if not print_only:
            command.run(words)


class Accounting(str, enum.Enum):
    """Whose count of operations."""

    both = "both"
    paper = "paper"
    full = "full"


class Counter(str, enum.Enum):
    """Whose formulas."""

    torch = "torch"
    fvcore = "fvcore"


@app.command()
def flops(
    model: Annotated[
        str,
        typer.Option(
            help="llava-1.5-7b, llava-1.5-13b, llava-next-7b, qwen2.5-vl-3b or qwen2.5-vl-7b; or a LLaVA's, "
            "LLaVA-NeXT's or Qwen-VL's folder or Hub id, of which only the configuration is read.",
            callback=_at_home,
        ),
    ],
    keep: BudgetOption = DEFAULT_KEEP,
    text_tokens: Annotated[int, typer.Option(help="Tokens of the prompt, the image aside.")] = 32,
    image: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Pixels of the image, for LLaVA-NeXT and Qwen-VL."),
    ] = None,
    merge: MergeOption = None,
    weigh: WeighOption = None,
    accounting: Annotated[Accounting, typer.Option(help="Count to show.")] = Accounting.both,
    counter: Annotated[Counter, typer.Option(help="Formulas to count by.")] = Counter.torch,
    as_json: JsonOption = False,
) -> None:
    """Count a model's floating-point operations, unpruned and pruned, without its weights."""
    from ocvtp.commands import flops as command

    with told_plainly():
        found = command.run(
            model=model,
            keep=keep,
            text_tokens=text_tokens,
            image=image,
            wishes=_wishes(merge, weigh),
            counter=counter.value,
        )
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        command.show(found, accounting.value, Console())


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
