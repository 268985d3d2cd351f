"""``ocvtp demo``: what pruning does to answers and to speed, with nothing to download.

Answers come from a small model that was trained (:mod:`ocvtp.commands.answers`), times from a large one that
was not, on a real photograph. The large one has LLaVA-1.5's vision geometry (CLIP-L/14-336, 576 tokens) and a
language model of half a billion parameters. Its weights are random, so what it says and which patches it
keeps mean nothing; how long it takes does not depend on the values.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ocvtp.commands.dropped import STOOD_FOR, THROWN_AWAY
from ocvtp.commands.errors import UserError
from ocvtp.commands.loading import check_keep
from ocvtp.commands.output import check_writable, make_folder
from ocvtp.commands.progress import busy, steps
from ocvtp.commands.timing import seconds
from ocvtp.cost.published import CLIP_L_336

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from ocvtp import OCPruner

_NOTE = "random weights: the selection means nothing"
_RANDOM = "Weights are random: answers and kept patches mean nothing here, only the times are real."


@dataclass(frozen=True)
class DemoSize:
    """Shape of the demo's model.

    Attributes:
        vision: of the CLIP tower: ``hidden_size``, ``intermediate_size``, ``num_hidden_layers``,
            ``num_attention_heads``, ``image_size``, ``patch_size``.
        text: of the Llama language model, ``vocab_size`` among them; the last id is the image placeholder.
        pruner: ``hidden_dim``, ``slot_dim``, ``ffn_dim`` and ``layer``.
        prompt_tokens: text tokens around the image.
    """

    vision: dict[str, int]
    text: dict[str, int]
    pruner: dict[str, int]
    prompt_tokens: int = 24

    @property
    def image_tokens(self) -> int:
        """Patches of an image."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    def config(self) -> Any:
        """Of the model."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

        return LlavaConfig(
            vision_config=CLIPVisionConfig(**self.vision),
            text_config=LlamaConfig(**self.text, eos_token_id=None, pad_token_id=0),
            image_token_index=self.text["vocab_size"] - 1,
            image_seq_length=self.image_tokens,
            vision_feature_layer=-2,
        )


LLAVA_SHAPED = DemoSize(
    vision=CLIP_L_336,
    text={
        "vocab_size": 32064,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    pruner={"hidden_dim": 2048, "slot_dim": 512, "ffn_dim": 2048, "layer": 8},
)


@dataclass(frozen=True)
class Comparison:
    """Seconds of every timed run, unpruned and pruned in turns.

    Attributes:
        name: of what was timed.
        unpruned: with all tokens.
        pruned: with the kept ones, the others thrown away.
        standing: with the kept ones, which stand for the others; empty where that is not timed.
    """

    name: str
    unpruned: list[float]
    pruned: list[float]
    standing: list[float] = field(default_factory=list)

    @property
    def speedup(self) -> float:
        """Ratio of the medians, with dropped tokens thrown away."""
        return self._times_as_fast(self.pruned)

    @property
    def standing_speedup(self) -> float | None:
        """The same with kept tokens that stand for the others, if that was timed."""
        return self._times_as_fast(self.standing) if self.standing else None

    def _times_as_fast(self, runs: list[float]) -> float:
        return statistics.median(self.unpruned) / statistics.median(runs)


def run_all(
    *,
    out: Path,
    image: Path | None,
    question: str | None,
    speed: bool | None,
    keep: int,
    repeats: int,
    threads: int | None,
    console: Console,
) -> None:
    """Answers of the small model, then times of the large one.

    Args:
        out: folder for the overlays.
        image: to ask the small model about; default: its scenes.
        question: to ask; default: those of the scenes.
        speed: whether to time the large model; by default unless something is asked.
        keep: tokens of the large model's 576; the small one keeps the same share.
        repeats: timed runs of each kind.
        threads: of PyTorch; default: all.
        console: to print on.

    Raises:
        UserError: as :func:`run` and :func:`ocvtp.commands.answers.run`, before anything slow.
    """
    from ocvtp.commands import answers

    _check_request(out, keep, LLAVA_SHAPED)
    own = image is not None or question is not None
    speed = not own if speed is None else speed
    if speed:
        _photograph()
    assets = answers.find_assets()
    if assets is None and own:
        raise UserError(
            "the demo's small model is in the repository's assets/, not in this installation: "
            "clone the repository and install with: pip install -e '.[demo]'"
        )
    if assets is None:
        console.print(
            "no assets/ here (it is in the repository): the answers of the small model are left out"
        )
    else:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        share = keep / LLAVA_SHAPED.image_tokens
        answers.run(assets, out=out, share=share, image=image, question=question, console=console)
    if speed:
        run(out=out, keep=keep, repeats=repeats, threads=threads, console=console)


def run(
    *,
    out: Path,
    keep: int,
    repeats: int,
    threads: int | None,
    console: Console,
    size: DemoSize = LLAVA_SHAPED,
) -> list[Comparison]:
    """Build, check, time, draw; returns the timings that the table shows.

    Raises:
        UserError: an impossible budget or output folder, or scikit-image is not installed.
    """
    path = _check_request(out, keep, size)
    photograph = _photograph()

    import torch

    import ocvtp
    from ocvtp.commands.visualize import draw

    if threads is not None:
        torch.set_num_threads(threads)
    console.print(f"[bold]{_RANDOM}[/]")
    with busy(console, "building a LLaVA-1.5-shaped model and a pruner with random weights"):
        torch.manual_seed(0)
        model, processor = _build(size)
        pruner = ocvtp.OCPruner(ocvtp.PrunerConfig(in_dim=size.vision["hidden_size"], **size.pruner)).eval()
    inputs = _inputs(size, processor, photograph)
    billions = sum(p.numel() for p in _language_model(model)) / 1e9
    console.print(
        f"photograph: scikit-image's astronaut; tower: {size.vision['num_hidden_layers']} layers, "
        f"{size.image_tokens} tokens; language model: {billions:.2f} B parameters; "
        f"float32, {torch.get_num_threads()} CPU threads"
    )

    with steps(console, "correctness first", 5) as step:
        long, short = _check(model, pruner, inputs, keep, step)
    console.print(
        "checks passed: all tokens kept and stood for give the unpatched model's token; "
        f"{keep} kept give that of a prompt shortened by hand"
    )
    comparisons = _time(model, pruner, inputs, keep, (long, short), repeats, console)
    console.print(_table(comparisons, keep, size, repeats))
    console.print(_RANDOM)

    with busy(console, "drawing"), ocvtp.pruned(model, pruner, keep=keep, **STOOD_FOR):
        picture = draw(model, inputs["pixel_values"], processor, _NOTE)
    picture.save(path)
    console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return comparisons


def _check_request(out: Path, keep: int, size: DemoSize) -> Path:
    """Where the overlay will go."""
    check_keep(keep)
    if keep > size.image_tokens:
        raise UserError(f"--keep must be at most {size.image_tokens}, the tokens of one image; got {keep}")
    make_folder(out)
    path = out / "overlay.png"
    check_writable(path)
    return path


def _photograph() -> Image:
    try:
        from skimage import data
    except ImportError as error:
        raise UserError("the demo's photograph comes with scikit-image: pip install scikit-image") from error
    from PIL import Image

    return Image.fromarray(data.astronaut())


def _build(size: DemoSize) -> tuple[Any, Any]:
    """``(model, image processor)``."""
    from transformers import LlavaForConditionalGeneration

    side = size.vision["image_size"]
    processor = _image_processor_class()(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return LlavaForConditionalGeneration(size.config()).eval(), processor


def _image_processor_class() -> Any:
    """CLIP's image processor on pillow, under the name this release of transformers has for it."""
    import transformers

    found = getattr(transformers, "CLIPImageProcessorPil", None)
    return found if found is not None else transformers.CLIPImageProcessor


def _inputs(size: DemoSize, processor: Any, photograph: Image) -> dict[str, torch.Tensor]:
    """A prompt of made-up words around the photograph's placeholders, ``[1, S]``, and its pixels."""
    import torch

    words = torch.randint(1, size.text["vocab_size"] - 1, (size.prompt_tokens,))
    placeholders = torch.full((size.image_tokens,), size.text["vocab_size"] - 1)
    before = size.prompt_tokens // 2
    ids = torch.cat([words[:before], placeholders, words[before:]])[None]
    pixels = processor(images=photograph, return_tensors="pt")["pixel_values"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def _first_token(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    return int(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1])


def _check(
    model: Any,
    pruner: OCPruner,
    inputs: dict[str, torch.Tensor],
    keep: int,
    step: Callable[[str], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare first tokens; returns the embedded long and short prompts, ``[1, S, D]`` and ``[1, S', D]``."""
    import torch

    import ocvtp
    from ocvtp.vlm import select

    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    where = ids == model.config.image_token_id
    tokens = int(where.sum())
    step("every token kept")
    with ocvtp.pruned(model, pruner, keep=tokens, **STOOD_FOR):
        all_kept = _first_token(model, inputs)
    step(f"{keep} tokens kept")
    with ocvtp.pruned(model, pruner, keep=keep, **THROWN_AWAY):
        pruned_token = _first_token(model, inputs)
        selection = select(model, pixels)
    step("a prompt shortened by hand")
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels)
        rows = torch.cat(list(getattr(features, "pooler_output", features)))
        long = model.get_input_embeddings()(ids).masked_scatter(where[..., None], rows)
    stays = ~where
    stays[0, where[0].nonzero()[selection.indices[0], 0]] = True
    short = long[:, stays[0]]
    step("unpruned")
    if all_kept != _first_token(model, inputs):
        raise RuntimeError("with every token kept, the pruned model answers differently: please report this")
    step("the shortened prompt")
    if pruned_token != _prefill(model, short):
        raise RuntimeError("the pruned model disagrees with a prompt shortened by hand: please report this")
    return long, short


def _prefill(model: Any, embeddings: torch.Tensor) -> int:
    """The language model alone, on an embedded prompt ``[1, S, D]``; the first token."""
    import torch

    with torch.no_grad():
        return int(model(inputs_embeds=embeddings, logits_to_keep=1).logits[0, -1].argmax())


def _time(
    model: Any,
    pruner: OCPruner,
    inputs: dict[str, torch.Tensor],
    keep: int,
    prompts: tuple[torch.Tensor, torch.Tensor],
    repeats: int,
    console: Console,
) -> list[Comparison]:
    """Unpruned and pruned in turns: a slow moment of the machine hits both. The checks were the warm-up."""
    import ocvtp

    long, short = prompts
    prefill = Comparison("language model prefill", [], [])
    first = Comparison("time to first token", [], [])
    with steps(console, "timing", 5 * repeats) as step:
        for number in range(repeats):
            turn = f"round {number + 1} of {repeats}"
            step(f"{turn}, prefill, unpruned")
            prefill.unpruned.append(seconds(lambda: _prefill(model, long)))
            step(f"{turn}, prefill, pruned")
            prefill.pruned.append(seconds(lambda: _prefill(model, short)))
            step(f"{turn}, first token, unpruned")
            first.unpruned.append(seconds(lambda: _first_token(model, inputs)))
            step(f"{turn}, first token, pruned")
            with ocvtp.pruned(model, pruner, keep=keep, **THROWN_AWAY):
                first.pruned.append(seconds(lambda: _first_token(model, inputs)))
            step(f"{turn}, first token, kept ones that stand for all")
            with ocvtp.pruned(model, pruner, keep=keep, **STOOD_FOR):
                first.standing.append(seconds(lambda: _first_token(model, inputs)))
    return [prefill, first]


def _table(comparisons: list[Comparison], keep: int, size: DemoSize, repeats: int) -> Table:
    table = Table(
        "",
        f"unpruned, {size.image_tokens} tokens",
        f"pruned, {keep} tokens",
        "speed-up",
        f"{keep} that stand for all",
        "speed-up",
        title=f"seconds, median of {repeats} (least - most), random weights",
    )
    for one in comparisons:
        cells = [one.name, _spread(one.unpruned), _spread(one.pruned), f"{one.speedup:.2f}x"]
        if one.standing_speedup is not None:
            cells += [_spread(one.standing), f"{one.standing_speedup:.2f}x"]
        table.add_row(*cells)
    return table


def _spread(runs: list[float]) -> str:
    return f"{statistics.median(runs):.3f} ({min(runs):.3f} - {max(runs):.3f})"


def _language_model(model: Any) -> list[torch.nn.Parameter]:
    return [*model.model.language_model.parameters(), *model.lm_head.parameters()]
