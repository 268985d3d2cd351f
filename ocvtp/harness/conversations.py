"""What is asked: lmms-eval's messages, with system prompt and pictures as the published models had them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ocvtp.stored.refused import Refused, shown
from ocvtp.stored.seal import file_digest
from ocvtp.stored.strict_json import parse_object

#: By name, for ``system_prompt=``. What LLaVA-1.5 and LLaVA-NeXT (Vicuna) were trained and published with;
#: the templates of llava-hf's checkpoints leave it out.
PROMPTS = {
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
}

Conversation = list[dict[str, Any]]


def text_of(name: str, given: str) -> str:
    """A text: by name, from a file, or as it is. Of a file every character counts, but for a system's words.

    Args:
        name: of the argument.
        given: to it.

    Raises:
        ValueError: neither a name nor a file, and nothing that could be meant; or a file that is empty or no
            text; or JSON without an entry of that name.
    """
    if given in PROMPTS:
        return PROMPTS[given]
    if os.path.isfile(given):
        try:
            with open(given, encoding="utf-8") as file:
                text = file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: {given} is no text in UTF-8") from error
        if given.endswith(".json"):  # as repositories have a template
            text = _entry(name, given, text)
        if not text.strip():
            raise ValueError(f"{name}: {given} is empty")
        return text.strip() if name == "system_prompt" else text
    if name == "system_prompt" and " " not in given.strip():
        raise ValueError(
            f"{name}: {given} is no file here, and none of {', '.join(PROMPTS)}; one word is hardly what a "
            "system says"
        )
    if name == "chat_template" and "{" not in given:
        raise ValueError(f"{name}: {given} is no file here, and no template")
    return given


def _entry(name: str, file: str, text: str) -> str:
    try:
        found = parse_object(text).get(name)
    except Refused as error:
        raise ValueError(f"{name}: {file}: {error}") from error
    if not isinstance(found, str):
        raise ValueError(f'{name}: {file} has no text "{name}"')
    return found


def prepared(
    messages: Sequence[dict[str, Any]], system: str | None, mean: Sequence[float] | None
) -> Conversation:
    """Messages as the model is to see them.

    Args:
        messages: in transformers' form; not changed.
        system: what the system says, in the place of what it says in ``messages``; ``None``: as it is.
        mean: colour, 0 to 1, around pictures that are no squares; ``None``: they stay as they are.

    Raises:
        ValueError: something to hear; or a picture that can't be put on a square.
    """
    found: Conversation = []
    if system is not None:
        found.append({"role": "system", "content": [{"type": "text", "text": system}]})
    for message in messages:
        if system is None or message["role"] != "system":
            found.append({**message, "content": [_part(part, mean) for part in message["content"]]})
    return found


def digest(conversation: Conversation) -> str:
    """Of everything that is asked, words and pictures alike: 16 digits."""
    found = hashlib.sha256()
    for message in conversation:
        found.update(f"{message['role']}\n".encode())
        for part in message["content"]:
            for name, value in sorted(part.items()):
                found.update(f"{name} {type(value).__name__} ".encode())
                found.update(_bytes(value, may_be_file=name != "type" and part["type"] != "text"))
    return found.hexdigest()[:16]


def _bytes(value: Any, may_be_file: bool) -> bytes:
    if may_be_file and isinstance(value, (str, os.PathLike)) and os.path.isfile(value):
        # What it shows is asked, not what it is called.
        return file_digest(Path(value)).encode()
    if hasattr(value, "tobytes"):  # PIL's, NumPy's
        shape = getattr(value, "size", None), getattr(value, "mode", None), getattr(value, "shape", None)
        return str(shape).encode() + bytes(value.tobytes())
    return str(value).encode()


def count_pictures(conversation: Conversation) -> int:
    """Images and videos in a conversation."""
    return sum(part["type"] in ("image", "video") for message in conversation for part in message["content"])


def _part(part: dict[str, Any], mean: Sequence[float] | None) -> dict[str, Any]:
    if part["type"] == "audio":
        raise ValueError("this task has audio, which none of the models that ocvtp prunes can hear")
    if mean is None or part["type"] == "text":
        return part
    if part["type"] == "video":
        raise ValueError("pad_to_square is for pictures, and this task has videos")
    return {**part, "image": squared(_opened(part["image"]), mean)}


def _opened(picture: Any) -> Any:
    """A picture of PIL, from one, from numbers or from a file."""
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    if isinstance(picture, (str, os.PathLike)) and os.path.isfile(picture):
        with Image.open(picture) as file:
            return file.convert("RGB")
    raise ValueError(f"pad_to_square: can't open the picture {shown(picture)}")


def squared(picture: Any, mean: Sequence[float]) -> Any:
    """A picture in the middle of a square, as LLaVA's ``expand2square`` is described: colours cut to ints."""
    from PIL import Image

    picture = picture.convert("RGB")
    side = max(picture.size)
    colour = tuple(int(255 * value) for value in mean)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square
