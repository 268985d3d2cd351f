"""What is measured: a model, what vLLM is told, and how many ask at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ocvtp.cost.published import PUBLISHED, Published


@dataclass(frozen=True)
class Load:
    """One setting in which servers are compared.

    Attributes:
        concurrency: clients, of which each asks again as soon as it has its answer.
        requests: of all clients together.
    """

    concurrency: int
    requests: int


@dataclass(frozen=True)
class Preset:
    """A model and how it is measured.

    Attributes:
        name: for the file of results.
        config: of a LLaVA, made when it is needed.
        dtype: of its weights.
        keep: image tokens kept.
        options: of vLLM's server.
        loads: settings, the most telling first.
        warm_up: sent to each server before.
        rounds: of every server, in turns.
        question: words beside the picture.
        answer: tokens of every answer.
        sample_s: seconds between looks at a server's own counters.
        together: whether servers start at the same time.
        gpu_bytes: memory that all servers need on a GPU; 0 for a preset that runs on a CPU.
        pruner: sizes of the pruner that are not the published ones.
        note: for the file of results.
    """

    name: str
    config: Callable[[], Any]
    dtype: Literal["float32", "bfloat16"]
    keep: int
    options: tuple[str, ...]
    loads: tuple[Load, ...]
    warm_up: Load
    rounds: int = 3
    question: int = 24
    answer: int = 16
    sample_s: float = 0.1
    together: bool = False
    gpu_bytes: int = 0
    pruner: Mapping[str, int] = field(default_factory=dict)
    note: str | None = None


#: 576 image tokens from a narrow tower, and a language model of 92 M parameters.
_SMALL = Published(
    "small",
    "",
    "llava",
    {
        "vocab_size": 512,
        "max_position_embeddings": 4096,
        "hidden_size": 768,
        "intermediate_size": 2304,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "image_size": 336,
        "patch_size": 14,
    },
    (336, 336),
)


def _options(dtype: str, cache_bytes: int, *more: str) -> tuple[str, ...]:
    """What servers of all presets are told."""
    return (
        *("--dtype", dtype, "--max-model-len", "1024", "--max-num-seqs", "16"),
        *("--limit-mm-per-prompt", json.dumps({"image": 1}), "--kv-cache-memory-bytes", str(cache_bytes)),
        *more,
    )


_ON_CPU = ("--enforce-eager", "--block-size", "32", "--max-num-batched-tokens", "2048")

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "cpu-small",
            _SMALL.config,
            "float32",
            keep=64,
            options=_options("float32", 512 << 20, *_ON_CPU),
            loads=(Load(16, 32), Load(4, 16), Load(1, 10)),
            warm_up=Load(4, 4),
            sample_s=0.25,
            together=True,
            pruner={"hidden_dim": 512, "slot_dim": 256, "ffn_dim": 512},
        ),
        Preset(
            "llava-1.5-7b",
            PUBLISHED["llava-1.5-7b"].config,
            "bfloat16",
            keep=64,
            # The share is only looked at: what is left for the third server must be as much.
            options=_options("bfloat16", 6 << 30, "--gpu-memory-utilization", "0.25"),
            loads=(Load(16, 192), Load(4, 64), Load(1, 24)),
            warm_up=Load(16, 48),
            gpu_bytes=75 * 10**9,
        ),
    )
}


def rehearsal(preset: Preset) -> Preset:
    """The same run on a tiny model, on a CPU: every load once, with few requests."""

    def config() -> Any:
        made = preset.config()
        text, vision = made.get_text_config(), made.vision_config
        for part, layers in ((text, 2), (vision, 4)):
            part.num_hidden_layers, part.hidden_size, part.intermediate_size = layers, 64, 96
            part.num_attention_heads = 2  # vLLM's attention on a CPU has no heads narrower than 32
        text.num_key_value_heads, text.head_dim = 2, 32
        return made

    return replace(
        preset,
        config=config,
        options=_options(preset.dtype, 32 << 20, *_ON_CPU, "--distributed-executor-backend", "uni"),
        loads=tuple(Load(load.concurrency, max(2, load.concurrency // 2)) for load in preset.loads),
        warm_up=Load(1, 1),
        rounds=2,
        question=8,
        answer=4,
        sample_s=0.02,
        together=True,
        gpu_bytes=0,
        pruner={"hidden_dim": 64, "slot_dim": 32, "ffn_dim": 64},
        note="a rehearsal on a tiny model: figures mean nothing",
    )
