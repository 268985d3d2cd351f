"""The words of questions and answers, and the processor that turns both and pictures into tensors."""

from __future__ import annotations

from typing import Any

from bench.testbed.glyphs import LETTERS
from bench.testbed.scenes import COLORS, SHAPE_NAMES, SIZES, TEXTURES

PAD, BEGIN, END, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
_SPECIAL = (PAD, BEGIN, END, UNKNOWN, IMAGE)
_FUNCTION_WORDS = (
    "what which where how many is are there can you see a the of in on than or and color shape letter "
    "picture part written left right above below larger smaller thing things yes no answer : ?"
)
_PLACES = ("top-left", "top", "top-right", "center", "bottom-left", "bottom", "bottom-right")
_PLURALS = tuple(name + ("es" if name == "cross" else "s") for name in SHAPE_NAMES)
_NUMBERS = tuple("0123456")
WORDS = (
    *_SPECIAL,
    *_FUNCTION_WORDS.split(),
    *COLORS,
    *SHAPE_NAMES,
    *_PLURALS,
    *TEXTURES,
    *SIZES,
    *_PLACES,
    *_NUMBERS,
    *LETTERS,
)
#: Number of every word.
VOCABULARY = {word: number for number, word in enumerate(WORDS)}
#: What stands between a question and its answer.
ANSWER = " answer:"
_CHAT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% else %}{{ ' answer: ' + (message['content'] if message['content'] is string "
    "else message['content'][0]['text']) + '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' answer:' }}{% endif %}"
)


def prompt(question: str) -> str:
    """A question about one picture, as the model is asked."""
    return f"{IMAGE} {question}{ANSWER}"


def build_tokenizer() -> Any:
    """One token for a word; others are unknown. It starts a text with the token to begin with."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    assert len(VOCABULARY) == len(WORDS)
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split("?", "isolated"),
            pre_tokenizers.Split(":", "isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, VOCABULARY[BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_processor(side: int, patch: int) -> Any:
    """For pictures of ``side`` pixels, cut in patches of ``patch``."""
    import transformers

    images = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return transformers.LlavaProcessor(
        image_processor=images(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=[0.5] * 3,
            image_std=[0.25] * 3,
        ),
        tokenizer=build_tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        chat_template=_CHAT,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
