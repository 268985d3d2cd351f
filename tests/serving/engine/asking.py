"""Requests, and what vLLM and transformers answer."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ocvtp
import ocvtp.serving
from tests.serving.engine import folders

SIZES = [(112, 140), (56, 168), (168, 60), (100, 100), (90, 50), (200, 120)]  # height, width
Answer = list[int]


@dataclass(frozen=True)
class Request:
    """What is asked."""

    prompt: str
    images: tuple[Image.Image, ...] = ()

    def for_vllm(self) -> dict[str, Any]:
        """As ``LLM.generate`` takes it."""
        data = {"multi_modal_data": {"image": list(self.images)}} if self.images else {}
        return {"prompt": self.prompt, **data}


def pictures(count: int = 6, seed: int = 3) -> list[Image.Image]:
    """Waves and noise, of different sizes."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        y, x = np.mgrid[0:height, 0:width]
        waves = [
            127 + 120 * np.sin(x / rng.uniform(3, 30) + y / rng.uniform(3, 30) + rng.uniform(0, 6))
            for _ in range(3)
        ]
        pixels = np.stack(waves, -1) + rng.normal(0, 30, (height, width, 3))
        made.append(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))
    return made


def requests(folder: Path) -> list[Request]:
    """Every size, two images (different and the same), none, and one that comes back with another text."""
    from transformers import AutoProcessor

    images = pictures()
    if folder.name == Path(folders.PALIGEMMA).name:  # one image, and no chat template
        return [Request("what is this?", (image,)) for image in images]
    processor = AutoProcessor.from_pretrained(folder)

    def chat(text: str, *shown: Image.Image) -> Request:
        content = [*({"type": "image"} for _ in shown), {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return Request(prompt, shown)

    return [
        *(chat("what is this?", image) for image in images),
        chat("compare these two", images[1], images[2]),
        chat("the same?", images[0], images[0]),
        chat("w", images[5], images[3]),
        chat("no picture here"),
        chat("another question about the first, with a longer text so that chunks move", images[0]),
    ]


#: Engines of small models in this process.
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 64 << 20,
    "limit_mm_per_prompt": {"image": 2},
    "block_size": 32,
    "distributed_executor_backend": "uni",
}


def engine_options(folder: Path) -> dict[str, Any]:
    """What a family's images want otherwise."""
    if folder.name in (Path(folders.IDEFICS3).name, Path(folders.SMOLVLM).name):
        return {"max_model_len": 1536}  # tiles enough for a thousand tokens
    if folder.name == Path(folders.PALIGEMMA).name:
        return {"limit_mm_per_prompt": {"image": 1}}
    return {}


@contextlib.contextmanager
def engine(folder: Path, settings: Mapping[str, Any] | None, **options: Any) -> Iterator[Any]:
    """A running ``LLM``; with ``settings`` a pruned one."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    pruned = {} if settings is None else ocvtp.serving.engine_args(str(folder), **settings)
    llm = None
    try:
        llm = LLM(model=str(folder), **{**ENGINE, **engine_options(folder), **pruned, **options})
        # A caller that held it would end it after the next has begun, and take the process group with it.
        yield weakref.proxy(llm)
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()  # whatever failed, the next engine starts afresh


def ask(llm: Any, asked: Sequence[Request], tokens: int = 8, **more: Any) -> list[Any]:
    """vLLM's outputs, in the order of the requests."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    outputs: list[Any] = llm.generate([one.for_vllm() for one in asked], sampling, use_tqdm=False, **more)
    return outputs


def answers(outputs: Sequence[Any]) -> list[Answer]:
    """Tokens of vLLM's outputs."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def model_of(llm: Any) -> Any:
    """vLLM's model in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model


def transformers_model(folder: Path, settings: Mapping[str, Any] | None) -> Any:
    """The same model in transformers, pruned by :func:`ocvtp.apply` as the engine is."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    if settings is not None:
        options = dict(settings)
        pruner = options.pop("pruner", "greedy_dpp")
        if Path(pruner).is_dir():
            pruner = ocvtp.OCPruner.from_pretrained(pruner)
        ocvtp.apply(model, pruner, weigh=False, **options)
    return model


def inputs_of(folder: Path, processor: Any, request: Request) -> dict[str, torch.Tensor]:
    """Arguments of ``generate``."""
    made = processor(images=list(request.images) or None, text=[request.prompt], return_tensors="pt")
    inputs = {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}
    if folder.name == Path(folders.GEMMA3).name:
        # vLLM's CPU attention is causal among image tokens too, where its GPU attention is not: so are
        # transformers' without this.
        inputs.pop("token_type_ids", None)
    return inputs


def generate(model: Any, inputs: Mapping[str, torch.Tensor], tokens: int = 8) -> Answer:
    """Greedy tokens of transformers."""
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=0,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            repetition_penalty=1.0,
        )
    new: Answer = out[0, inputs["input_ids"].shape[1] :].tolist()
    return new


def reference(
    folder: Path, settings: Mapping[str, Any] | None, asked: Sequence[Request], tokens: int = 8
) -> list[Answer]:
    """What :func:`ocvtp.apply` answers, one request at a time."""
    from transformers import AutoProcessor

    model, processor = transformers_model(folder, settings), AutoProcessor.from_pretrained(folder)
    return [generate(model, inputs_of(folder, processor, one), tokens) for one in asked]
