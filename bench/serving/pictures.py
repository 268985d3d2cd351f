"""Pictures that no server has seen before, and what a client asks about them."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from bench.testbed.language import VOCABULARY

#: What servers call the model.
MODEL = "model"
_WORDS = tuple(word for word in VOCABULARY if word.isalpha())
_WAVES, _NOISE = 120.0, 20.0


def picture(number: int, side: int) -> Image.Image:
    """Waves and noise, the same for the same number: no cache of a server has another one's."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:side, 0:side]
    waves = [np.sin(x / rng.uniform(5, 60) + y / rng.uniform(5, 60)) for _ in range(3)]
    pixels = 127 + _WAVES * np.stack(waves, -1) + rng.normal(0, _NOISE, (side, side, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def question(words: int) -> str:
    """Of words that the tokenizer has, one token for each."""
    return " ".join(_WORDS[number % len(_WORDS)] for number in range(words))


def message(words: int) -> list[dict[str, Any]]:
    """One picture and a question, as a chat template takes them."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question(words)}]}]


def body(image: Image.Image, words: int, answer: int, mark: str | None = None) -> bytes:
    """A request for a streamed greedy answer of ``answer`` tokens, ready to be sent.

    Args:
        image: the picture.
        words: of the question.
        answer: tokens.
        mark: the client's own name of the picture, by which servers know it instead of by its pixels.
    """
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    shown: dict[str, Any] = {"type": "image_url", "image_url": {"url": url}}
    if mark is not None:
        shown["uuid"] = mark
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": [shown, {"type": "text", "text": question(words)}]}],
        "temperature": 0,
        "max_tokens": answer,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    return json.dumps(asked).encode()
