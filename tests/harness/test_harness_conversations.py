"""Messages as the model sees them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ocvtp.harness.conversations import PROMPTS, count_pictures, prepared, squared, text_of


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def asked(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(("width", "height"), [(5, 3), (3, 6), (4, 4)])
def test_a_square_has_the_picture_in_its_middle(width: int, height: int) -> None:
    before = picture(width, height)
    made = np.asarray(squared(before, (0.48145466, 0.4578275, 0.40821073)))
    side = max(width, height)
    assert made.shape == (side, side, 3)
    top, left = (side - height) // 2, (side - width) // 2
    assert np.array_equal(made[top : top + height, left : left + width], np.asarray(before))
    around = np.ones((side, side), dtype=bool)
    around[top : top + height, left : left + width] = False
    assert (made[around] == (122, 116, 104)).all()  # int(255 * mean), as LLaVA's code cuts it


def test_system_words_come_first_and_once() -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "theirs"}]},
        *asked({"type": "text", "text": "?"}),
    ]
    before = copy.deepcopy(messages)
    made = prepared(messages, "ours", None)
    assert [message["role"] for message in made] == ["system", "user"]
    assert made[0]["content"][0]["text"] == "ours"
    assert messages == before
    assert prepared(messages, None, None) == before


def test_pictures_are_squared_and_counted_wherever_they_are() -> None:
    parts = [{"type": "image", "image": picture(5, 3)}, {"type": "text", "text": "and"}]
    talk = prepared(asked(*parts, *parts, {"type": "video", "video": "file"}), None, (0.5, 0.5, 0.5))
    assert [part["image"].size for part in talk[0]["content"] if part["type"] == "image"] == [(5, 5)] * 2
    assert count_pictures(talk) == 3
    assert parts[0]["image"].size == (5, 3)
    assert count_pictures(prepared(asked({"type": "text", "text": "?"}), None, None)) == 0


def test_sound_is_refused() -> None:
    with pytest.raises(ValueError, match="audio"):
        prepared(asked({"type": "audio", "audio": "file"}), None, None)


def test_a_text_comes_by_name_from_a_file_or_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text(" Be brief.\n")
    assert text_of("system_prompt", "vicuna_v1") == PROMPTS["vicuna_v1"]
    assert text_of("system_prompt", str(file)) == "Be brief."
    assert text_of("system_prompt", "Be brief.") == "Be brief."
    assert text_of("chat_template", "{{a}}/{{b}}") == "{{a}}/{{b}}"
    with pytest.raises(ValueError, match="chat_template: no file at"):
        text_of("chat_template", str(tmp_path / "nothing.jinja"))
    file.write_text("\n")
    with pytest.raises(ValueError, match=r"system_prompt: .* is empty"):
        text_of("system_prompt", str(file))
    file.write_text("{{a}}\n\n")
    assert text_of("chat_template", str(file)) == "{{a}}\n\n"
    entry = tmp_path / "chat_template.json"
    entry.write_text('{"chat_template": "{{a}}\\n"}')
    assert text_of("chat_template", str(entry)) == "{{a}}\n"
    entry.write_text('{"template": "{{a}}"}')
    with pytest.raises(ValueError, match='has no text "chat_template"'):
        text_of("chat_template", str(entry))
    entry.write_text("{")
    with pytest.raises(ValueError, match=r"chat_template: .*can't be read as JSON"):
        text_of("chat_template", str(entry))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        text_of("system_prompt", str(file))
