"""What a vision-language model costs, unpruned and pruned, counted on the meta device.

Nothing is computed and no weights exist, so that models of any size can be counted on any machine. The parts
are run, not described: the tower and the choice by the code that :func:`ocvtp.apply` runs on a GPU, whose
kernels have FLOP formulas; the language model by transformers.

What counts is what a counter has a formula for, two operations for a multiply-add: matrix products,
convolutions and our kernels. Normalisation, softmax and activations do not. Causal attention counts in full,
as eager attention computes it. The weights of proportional attention are added to its mask: they are free.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from ocvtp.cost.counters import Counter, Products, counter_of
from ocvtp.methods.in_llm import Inside, averages
from ocvtp.pruner import OCPruner
from ocvtp.pruner.config import PrunerConfig
from ocvtp.vlm.contracts.adapter import Adapter
from ocvtp.vlm.contracts.reducer import Reducer, Rival
from ocvtp.vlm.contracts.selector import Rule
from ocvtp.vlm.contracts.settings import Merge, Settings
from ocvtp.vlm.encode.encode import choose, encode
from ocvtp.vlm.families import adapter_for
from ocvtp.vlm.families.arguments import picture_arguments
from ocvtp.vlm.options import Options
from ocvtp.vlm.resolving import resolve
from ocvtp_kernels._arch import pretend
from ocvtp_kernels._checks import as_int

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl")
_META = torch.device("meta")
#: Of the models counted; any architecture with kernels for it has the same products.
_ARCHITECTURE = "sm90"


@dataclass(frozen=True)
class Parts:
    """Floating-point operations of one call with one image.

    Attributes:
        vision_tower: that turns pixels into patch tokens; pruned, it stops at the layer that is consumed.
        pruner: fill scores and choice; of these 0 without pruning.
        projector: on all or on kept tokens: on all, too, where dropped ones are averaged after it, or their
            owners found by what it makes. Of Qwen-VL, which merges patches there, its merger.
        merging: the nearest kept token of each, and the means; 0 where dropped tokens are thrown away.
        prefill: the language model on the whole prompt, without its head.
        head: of the language model, for the last token.
        decode_step: one further token, head included, with the prompt in the cache.
    """

    vision_tower: int
    pruner: int
    projector: int
    merging: int
    prefill: int
    head: int
    decode_step: int

    @property
    def first_token(self) -> int:
        """From pixels to the first token's logits."""
        vision = self.vision_tower + self.pruner + self.projector + self.merging
        return vision + self.prefill + self.head

    def tflops(self) -> dict[str, float]:
        """By part, in 10^12 operations."""
        names = ("vision_tower", "pruner", "projector", "merging", "prefill", "head")
        return {name: getattr(self, name) / 1e12 for name in (*names, "decode_step", "first_token")}


@dataclass(frozen=True)
class Cost:
    """A call with one image, unpruned and pruned.

    Attributes:
        image_tokens: candidates: tokens of the image that are chosen among.
        keep: how many of them are kept before the language model.
        average: how many of the image's rows go into a layer of the language model, on average: with what the
            model adds, and fewer behind cuts inside.
        merge: where dropped tokens are averaged into kept ones, if they are.
        weigh: whether the language model knows how many a kept one stands for.
        text_tokens: of the prompt, the image aside.
        prompt_tokens: that the language model reads, unpruned and pruned. LLaVA-NeXT's newlines among them.
        unpruned: operations of the model as it is.
        pruned: with ocvtp.
        thrown_away: the same if dropped tokens were thrown away, whatever ``merge`` and ``weigh`` are.
        paper: the language model by the paper's accounting (:func:`paper_flops`), unpruned and pruned.
    """

    image_tokens: int
    keep: int
    average: float
    merge: Merge
    weigh: bool
    text_tokens: int
    prompt_tokens: tuple[int, int]
    unpruned: Parts
    pruned: Parts
    thrown_away: Parts
    paper: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; TFLOP, and ratios of pruned to unpruned."""
        unpruned, pruned = self.paper
        return {
            "keep": self.keep,
            "average": round(self.average, 4),
            "merge": self.merge,
            "weigh": self.weigh,
            "text_tokens": self.text_tokens,
            "image_tokens": self.image_tokens,
            "prompt_tokens": {"unpruned": self.prompt_tokens[0], "pruned": self.prompt_tokens[1]},
            "paper": {
                "unpruned_tflops": unpruned / 1e12,
                "pruned_tflops": pruned / 1e12,
                "ratio": pruned / unpruned,
            },
            "full": {
                "unpruned": self.unpruned.tflops(),
                "pruned": self.pruned.tflops(),
                "ratio": self.pruned.first_token / self.unpruned.first_token,
                "thrown_away": self.thrown_away.tflops(),
                "thrown_away_ratio": self.thrown_away.first_token / self.unpruned.first_token,
            },
        }


def paper_flops(layers: int, width: int, ffn: int, tokens: int) -> int:
    """``2 L (4 n d^2 + 2 n^2 d + 2 n d m)``: the published accounting of a prefill of ``n`` tokens.

    It is FastV's (arXiv 2403.06764), twice for a multiply-add. It has two matrices of the feed-forward
    network, where LLaMA and Qwen have three, and neither tower, projector nor head. With 32 text tokens it
    gives the 33.76 and 1.95 TFLOP that arXiv 2511.20439 prints for LLaVA-NeXT with 2880 and 160 tokens.
    """
    return 2 * layers * (4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * ffn)


def count(
    config: Any,
    keep: float = 64,
    text_tokens: int = 32,
    image: tuple[int, int] | None = None,
    *,
    pruner: PrunerConfig | None = None,
    merge: Merge | Literal["auto"] | None = None,
    weigh: bool | Literal["auto"] | None = None,
    method: Rule | Rival | Inside | Reducer | None = None,
    counter: Counter = "torch",
) -> Cost:
    """Count a call with one image at batch 1.

    Args:
        config: of a model of :data:`FAMILIES`; say
            ``ocvtp.cost.published.PUBLISHED["llava-1.5-7b"].config()``.
        keep: tokens to keep: a number, or a share such as ``0.25``.
        text_tokens: of the prompt, the image aside.
        image: height and width of the image in pixels; default: what a LLaVA-1.5's tower takes, and four
            tiles of LLaVA-NeXT. Qwen-VL has no default.
        pruner: sizes of the pruner; default: the published ones for the tower's width.
        merge: as of :func:`ocvtp.apply`; ``None``: its default.
        weigh: as of :func:`ocvtp.apply`; ``None``: its default.
        method: who chooses in the place of a pruner: a rule, or a method of others. One inside the language
            model leaves the vision side as it is.
        counter: whose formulas: ``"torch"``, or ``"fvcore"`` for a second opinion (``pip install fvcore``).

    Raises:
        ValueError: another family, an image that is no whole number of patches, a budget or a way of merging
            that it can't have, or no text; or a transformers that can't run models on the meta device (5.0).
        ImportError: no fvcore.
    """
    said = {name: value for name, value in (("merge", merge), ("weigh", weigh)) if value is not None}
    try:
        return _count(config, keep, text_tokens, image, pruner, method, said, counter)
    except RuntimeError as error:
        if "autocast" not in str(error):
            raise
        raise ValueError(
            "this transformers can't run models on the meta device, where operations are counted; a newer "
            "one can: pip install -U transformers"
        ) from error


@contextlib.contextmanager
def counting(
    config: Any, text_tokens: int = 32, image: tuple[int, int] | None = None
) -> Iterator[Callable[[Rule | Rival | Inside | Reducer, float], Cost]]:
    """:func:`count` of many methods at many budgets of one model, which is made only once.

    Args:
        config: as for :func:`count`.
        text_tokens: as for :func:`count`.
        image: as for :func:`count`.

    Yields:
        ``(method, keep) -> Cost``, which raises as :func:`count` does.

    Raises:
        ValueError: as :func:`count`.
    """
    text_tokens = _checked(config, text_tokens)
    with torch.no_grad(), pretend(_ARCHITECTURE):
        counted = _Counted(config, image, "torch")
        yield lambda method, keep: counted.cost(method, keep, text_tokens, {})


def _checked(config: Any, text_tokens: int) -> int:
    """``text_tokens``; raises ``ValueError`` for a model or a prompt that can't be counted."""
    family = config.model_type
    if family not in FAMILIES:
        raise ValueError(f"can't count a {family!r} model; these can be: {', '.join(FAMILIES)}")
    count = as_int(text_tokens)
    if count is None or count < 1:
        raise ValueError(f"text_tokens must be an int of at least 1; got {text_tokens!r}")
    return count


def _count(
    config: Any,
    keep: float,
    text_tokens: int,
    image: tuple[int, int] | None,
    pruner: PrunerConfig | None,
    method: Rule | Rival | Inside | Reducer | None,
    said: dict[str, Any],
    counter: Counter,
) -> Cost:
    if method is not None and pruner is not None:
        raise ValueError("give sizes of a pruner or a method, not both")
    text_tokens = _checked(config, text_tokens)
    with torch.no_grad(), pretend(_ARCHITECTURE):  # "auto" is our kernels, as on a GPU
        counted = _Counted(config, image, counter)
        chooser = counted.pruner(pruner) if method is None else method
        return counted.cost(chooser, keep, text_tokens, said)


class _Counted:
    """A model on the meta device, with what its vision side costs unpruned."""

    def __init__(self, config: Any, image: tuple[int, int] | None, counter: Counter) -> None:
        from transformers import AutoModelForImageTextToText

        size = _size(config, image)
        self._products = counter_of(counter)
        with _META:  # eager attention, whose products both counters see
            model = AutoModelForImageTextToText.from_config(
                config, dtype=torch.float16, attn_implementation="eager"
            ).eval()
        self._text = config.get_text_config()
        if hasattr(model.model, "image_newline"):  # the one weight that is looked at
            model.model.image_newline = nn.Parameter(torch.zeros(self._text.hidden_size))
        self._adapter = adapter_for(model)
        self._arguments = picture_arguments(config, size, 1, _empty)
        language = _LanguageModel(self._adapter, self._products)
        self._language = functools.cache(language.parts)
        self._before, self._rows, self._candidates = _unpruned_vision(
            self._adapter, self._arguments, self._products
        )

    def pruner(self, sizes: PrunerConfig | None) -> OCPruner:
        """A pruner of these sizes; by default of the published ones for the tower's width."""
        facts = self._adapter.facts({})
        if sizes is None:
            layer = min(PrunerConfig.layer, max(facts.consumed_layers) - 1)
            sizes = PrunerConfig(in_dim=facts.width, unit=facts.unit, layer=layer)
        with _META:
            return OCPruner(sizes).eval()

    def cost(self, chooser: Any, keep: float, text_tokens: int, said: dict[str, Any]) -> Cost:
        """Of a call, unpruned and pruned by ``chooser``."""
        before, candidates = self._before, self._candidates
        settings, _ = resolve(self._adapter, Options(chooser, keep, **said))
        if settings.before:
            after, plain, kept, budget = _pruned_vision(
                self._adapter, self._arguments, settings, before[2], self._products
            )
        else:
            after, plain, kept, budget = before, before, self._rows, candidates
        if budget == candidates:
            after = plain = before
        prompts = self._rows + text_tokens, kept + text_tokens
        text = self._text
        long, short, average = self._language(prompts[0]), self._language(prompts[1]), float(kept)
        if settings.inside is not None:
            inside = averages(settings.inside, depth=text.num_hidden_layers, tokens=kept)
            short, average = self._by_layer(inside.layers, text_tokens), inside.entering
        # The published figures have the image's candidates alone: newlines don't count.
        paper = [
            paper_flops(text.num_hidden_layers, text.hidden_size, text.intermediate_size, n + text_tokens)
            for n in (candidates, budget)
        ]
        return Cost(
            candidates,
            budget,
            average,
            settings.merge,
            settings.weigh,
            text_tokens,
            prompts,
            Parts(*before, *long),
            Parts(*after, *short),
            Parts(*plain, *short),
            (paper[0], paper[1]),
        )

    def _by_layer(self, rows: Sequence[int], text_tokens: int) -> tuple[int, int, int]:
        """:meth:`_LanguageModel.parts` where layers hold different numbers of the image's rows.

        All layers are alike, so each costs its share of a language model that has as many in all of them.
        What a method inside does to choose is not counted.
        """
        parts = [self._language(count + text_tokens) for count in rows]
        head = parts[0][1]
        prefill = sum(one for one, _, _ in parts) // len(parts)
        step = sum(one - head for _, _, one in parts) // len(parts)
        return prefill, head, step + head


# ------------------------------------------------------------------------------------------------ vision side


def _unpruned_vision(
    adapter: Adapter, arguments: dict[str, Any], products: Products
) -> tuple[tuple[int, int, int, int], int, int]:
    """Tower, pruner (0), projector, merging (0) as transformers runs them; rows in the prompt; candidates."""
    settings, _ = resolve(adapter, Options("grid", 1.0))
    vision = adapter.vision("image", arguments, settings)
    candidates = sum(segment.tokens for segment in vision.segments)
    model: Any = adapter.model
    pixels = arguments["pixel_values"]
    if "image_grid_thw" in arguments:
        # Upstream's tower reads its grids, which have no values here; ours runs the same blocks.
        tower = products(lambda: vision.run(None, None))
        everything = products(lambda: encode(adapter, arguments, settings, None))
        return (tower, 0, everything - tower, 0), sum(vision.totals), candidates
    tiles = pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
    tower = products(lambda: model.model.vision_tower(tiles, output_hidden_states=True).last_hidden_state)
    consumed = _empty(len(tiles), candidates // len(tiles), adapter.facts({}).width)
    projector = products(lambda: model.model.multi_modal_projector(consumed))
    return (tower, 0, projector, 0), sum(vision.totals), candidates


def _pruned_vision(
    adapter: Adapter, arguments: dict[str, Any], settings: Settings, everywhere: int, products: Products
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int], int, int]:
    """Tower, pruner, projector and merging as ocvtp runs them, each the difference it makes.

    Args:
        adapter: of the model.
        arguments: of the call.
        settings: who chooses, how many, and what becomes of the others.
        everywhere: what the projector costs on all tokens.
        products: counts.

    Returns:
        The four; the same without merging and weights; rows; tokens kept.
    """
    plain = replace(settings, merge="off", weigh=False)

    def vision() -> Any:
        return adapter.vision("image", arguments, plain)

    def asking(_: int, totals: Sequence[int]) -> list[torch.Tensor]:
        return [torch.empty(1, dtype=torch.int64, device=_META)] * len(totals)  # looking words up is free

    def encoding(how: Settings) -> int:
        return products(lambda: encode(adapter, arguments, how, None, asking=asking))

    # Also folds the pruner's weights, which happens once a checkpoint, not once a call.
    kept = sum(len(rows) for rows in encode(adapter, arguments, plain, None, asking=asking)["image"].rows)
    chosen = products(lambda: choose(adapter, arguments, plain, asking=asking))
    in_tower = isinstance(settings.selector, Reducer) and settings.selector.in_tower
    tower = chosen if in_tower else products(lambda: vision().run(settings.selector.read_layer, None))
    on_kept = encoding(plain) - chosen
    projector = everywhere if settings.standing and settings.merge != "features" else on_kept
    merging = encoding(settings) - chosen - projector if settings.standing else 0
    budget = settings.budget.of(sum(segment.tokens for segment in vision().segments))
    assert isinstance(budget, int)
    choice = chosen - tower
    return (tower, choice, projector, merging), (tower, choice, on_kept, 0), kept, budget


def _size(config: Any, image: tuple[int, int] | None) -> tuple[int, int]:
    side: int = getattr(config.vision_config, "image_size", 0)
    if config.model_type == "llava":
        if image not in (None, (side, side)):
            raise ValueError(f"this model's tower takes images of {side} x {side} pixels, no others")
        return side, side
    if image is None:
        if config.model_type != "llava_next":
            raise ValueError("an image of this model may have any size: say which")
        return 2 * side, 2 * side
    height, width = image
    unit = 1
    if config.model_type != "llava_next":
        unit = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    if height < unit or width < unit or height % unit or width % unit:
        raise ValueError(f"height and width of an image must be multiples of {unit} pixels; got {image}")
    return height, width


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16, device=_META)


# --------------------------------------------------------------------------------------------- language model


class _LanguageModel:
    """Counts a language model at any length."""

    def __init__(self, adapter: Adapter, products: Products) -> None:
        self._model, self._mrope, self._products = adapter.model, adapter.mrope, products
        self._width: int = self._model.config.get_text_config().hidden_size

    def parts(self, tokens: int) -> tuple[int, int, int]:
        """Prefill, head, and a decoding step after a prompt of so many tokens."""
        from transformers import DynamicCache

        language, head = self._model.model.language_model, self._model.lm_head
        prompt, one = (_empty(1, n, self._width) for n in (tokens, 1))
        prefill = self._products(lambda: self._run(language, prompt, None))
        cache = DynamicCache(config=self._model.config.get_text_config())
        self._run(language, prompt, cache)
        step = self._products(lambda: self._run(language, one, cache))
        last = self._products(lambda: head(one))
        return prefill, last, step + last

    def _run(self, language: Any, rows: torch.Tensor, cache: Any) -> torch.Tensor:
        held = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(held, held + rows.shape[1], device=_META)[None]
        if self._mrope:
            positions = positions.expand(3, 1, -1)
        output = language(inputs_embeds=rows, position_ids=positions, past_key_values=cache, use_cache=True)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden
