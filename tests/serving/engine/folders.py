"""Small random models in the layout of the published repositories, as vLLM's CPU backend can run them.

The patch's own fixtures, changed where vLLM or its CPU attention want more: heads of 32, Gemma's tokens of
several newlines; and Qwen3-VL-MoE, which has no fixture there.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests.vlm import hub_folders
from tests.vlm.hub_families import FAMILIES, Family

#: Of a model's name to its folder; the fixture ``hub``.
Hub = Callable[[str], Path]

LLAVA = "llava-hf/llava-1.5-7b-hf"
NEXT = "llava-hf/llava-v1.6-vicuna-7b-hf"
ONEVISION = "llava-hf/llava-onevision-qwen2-7b-ov-hf"
QWEN2 = "Qwen/Qwen2-VL-7B-Instruct"
QWEN2_5 = "Qwen/Qwen2.5-VL-7B-Instruct"
QWEN3 = "Qwen/Qwen3-VL-8B-Instruct"
MOE = "Qwen/Qwen3-VL-30B-A3B-Instruct"
INTERNVL = "OpenGVLab/InternVL3-8B-hf"
IDEFICS3 = "HuggingFaceM4/Idefics3-8B-Llama3"
SMOLVLM = "HuggingFaceTB/SmolVLM-Instruct"
GEMMA3 = "google/gemma-3-4b-it"
PALIGEMMA = "google/paligemma2-3b-pt-224"


def write(root: Path, name: str) -> Path:
    """``root/<org>/<name>``."""
    if name == MOE:
        return _write_moe(root)
    family = FAMILIES[name]
    config = copy.deepcopy(family.config)
    _widen(config)
    special = (*family.special, "\n\n", "\n\n\n", "\n\n\n\n") if name == GEMMA3 else family.special
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hub_folders.FAMILIES, name, dataclasses.replace(family, config=config, special=special))
        return hub_folders.write_folder(root, name)


def _widen(value: Any) -> None:
    """Heads of 32 instead of 16 in language models."""
    if isinstance(value, dict):
        if value.get("hidden_size") == 64 and value.get("num_attention_heads") == 4:
            value["num_attention_heads"], value["num_key_value_heads"] = 2, 1
            if "head_dim" in value:
                value["head_dim"] = 32
        if "mrope_section" in value:
            total = sum(value["mrope_section"])
            sections = [16 * part // total for part in value["mrope_section"]]
            sections[-1] += 16 - sum(sections)
            value["mrope_section"] = sections
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _widen(item)


def _write_moe(root: Path) -> Path:
    """Tokenizer and processor of Qwen3-VL, and a small language model of experts."""
    import transformers

    dense = write(root / "for-moe", QWEN3)
    folder = root / MOE
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"], config["architectures"] = "qwen3_vl_moe", ["Qwen3VLMoeForConditionalGeneration"]
    config["vision_config"]["model_type"] = "qwen3_vl_moe"
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    }
    config["text_config"] |= {"model_type": "qwen3_vl_moe_text", "decoder_sparse_step": 1, **experts}
    (folder / "config.json").write_text(json.dumps(config))
    model = hub_folders.random_weights(transformers.AutoConfig.from_pretrained(folder))
    state = {  # published expert weights are the other way round
        name: (weight.mT if ".experts." in name else weight).detach().bfloat16().contiguous()
        for name, weight in model.named_parameters()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def family_of(name: str) -> Family:
    """What the repository of that name has."""
    return FAMILIES[QWEN3 if name == MOE else name]
