"""A tiny LlavaProcessor on disk: word-level tokenizer, pillow image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from tests.vlm.tiny_llava import IMAGE, VOCAB


def image_processor(side: int = 56) -> Any:
    """CLIP's, on pillow (torchvision is no requirement), by the name this transformers has for it."""
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return kind(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def write_processor(folder: Path) -> Any:
    """Save a processor whose word ``w7`` is token 7, and return it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, IMAGE)), "<image>"]
    words += [f"w{i}" for i in range(IMAGE + 1, VOCAB)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    processor = transformers.LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    processor.save_pretrained(folder)
    return processor
