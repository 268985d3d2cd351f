"""What is measured: models, budgets, batch sizes, text lengths, modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from bench.e2e.methods import OURS, OWN, UNPRUNED, WEIGHED
from ocvtp import OCPruner, PrunerConfig
from ocvtp.commands.demo import LLAVA_SHAPED
from ocvtp.cost.published import PUBLISHED
from ocvtp.vlm.families import adapter_for

#: How the language model runs.
Mode = Literal["eager", "static cache", "captured prefill"]


@dataclass(frozen=True)
class Cell:
    """One setting in which methods are compared.

    Attributes:
        mode: how the language model runs.
        batch: prompts, of one image each.
        text_tokens: of each prompt, beside the image's.
        methods: to compare; default: all.
    """

    mode: Mode
    batch: int
    text_tokens: int
    methods: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Preset:
    """A model and how it is measured.

    Attributes:
        name: for the file of results.
        config: of the model, made when it is needed.
        image: height and width of each picture, in pixels.
        keep: image tokens kept.
        cells: settings, the most telling first.
        decode_tokens: timed after the first token.
        rounds: of every method, in turns.
        calls: timed in each round.
        gpu: whether it is only for GPUs.
        pruner: sizes of the pruner that are not the published ones.
    """

    name: str
    config: Any
    image: tuple[int, int]
    keep: int
    cells: tuple[Cell, ...]
    decode_tokens: int = 32
    rounds: int = 3
    calls: int = 5
    gpu: bool = True
    pruner: Mapping[str, int] = field(default_factory=dict)

    def build(self, device: torch.device) -> tuple[Any, OCPruner]:
        """The model and a pruner for it, as :func:`build` makes them."""
        return build(self.config(), device, **self.pruner)


def build(config: Any, device: torch.device, **pruner: int) -> tuple[Any, OCPruner]:
    """A model, float32 on a CPU and bfloat16 on a GPU, and a pruner for it; both of random weights.

    Weights are drawn where they stay: nothing is downloaded, nothing as large passes through the host.

    Args:
        config: of the model.
        device: for both.
        pruner: sizes of the pruner that are not the published ones.
    """
    from transformers import AutoModelForImageTextToText

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        facts = adapter_for(model).facts({})
        layer = min(PrunerConfig.layer, max(facts.consumed_layers) - 1)
        sizes = {"in_dim": facts.width, "unit": facts.unit, "layer": layer, **pruner}
        made = OCPruner(PrunerConfig(**sizes)).eval()
    # An answer must be as long as was asked for.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, made


def cells(batches: Sequence[int], texts: Sequence[int]) -> tuple[Cell, ...]:
    """All methods at the smallest size, without rivals where the prefill is captured; few at every other, and
    with a static cache."""
    few = (UNPRUNED, OURS, WEIGHED)
    modes: tuple[Mode, ...] = ("eager", "captured prefill")
    first, *others = [(batch, text) for batch in batches for text in texts]
    return (
        Cell("eager", *first),
        Cell("captured prefill", *first, OWN),
        Cell("static cache", *first, few),
        *(Cell(mode, *size, few) for size in others for mode in modes),
    )


def rehearsal(preset: Preset) -> Preset:
    """The same run on a model of the same family and few parameters: every cell once, on any device."""

    def config() -> Any:
        made = preset.config()
        text, vision = made.get_text_config(), made.vision_config
        text.num_hidden_layers, text.hidden_size, text.intermediate_size = 2, 256, 128
        text.num_attention_heads, text.num_key_value_heads = 2, 1
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = text.layer_types[:2]
        if hasattr(text, "head_dim"):
            text.head_dim = 128
        if made.model_type == "qwen2_5_vl":
            vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 4, 64, 96, 4
            vision.fullatt_block_indexes, vision.out_hidden_size = [1, 3], 256
        else:
            vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size = 8, 64, 96
            vision.num_attention_heads = 4
        return made

    small = {"hidden_dim": 64, "slot_dim": 32, "ffn_dim": 64}
    return replace(preset, config=config, decode_tokens=2, rounds=1, calls=1, gpu=False, pruner=small)


def _published(name: str, keep: int, batches: Sequence[int], texts: Sequence[int]) -> Preset:
    one = PUBLISHED[name]
    return Preset(name, one.config, one.image, keep, cells(batches, texts))


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "cpu-small",
            LLAVA_SHAPED.config,
            (336, 336),
            64,
            (Cell("eager", 1, LLAVA_SHAPED.prompt_tokens),),
            decode_tokens=4,
            calls=1,
            gpu=False,
        ),
        _published("llava-1.5-7b", 64, (1, 8), (32, 256)),
        _published("llava-next-7b", 160, (1, 8), (32, 256)),
        _published("qwen2.5-vl-7b", 144, (1, 8), (32, 256)),
    )
}
