"""Messages as the model sees them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ocvtp.harness.conversations import PROMPTS, count_pictures, digest, prepared, squared, text_of


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
    talk = prepared(asked(*parts, *parts), None, (0.5, 0.5, 0.5))
    assert [part["image"].size for part in talk[0]["content"] if part["type"] == "image"] == [(5, 5)] * 2
    assert count_pictures(talk) == 2
    assert count_pictures(asked(*parts, {"type": "video", "video": "file"})) == 2
    assert parts[0]["image"].size == (5, 3)
    assert count_pictures(prepared(asked({"type": "text", "text": "?"}), None, None)) == 0


def test_pictures_of_other_kinds_are_opened_or_refused(tmp_path: Path) -> None:
    one, grey = picture(5, 3), (0.5, 0.5, 0.5)
    one.save(tmp_path / "one.png")
    want = np.asarray(squared(one, grey))
    for other in (np.asarray(one), str(tmp_path / "one.png"), tmp_path / "one.png"):
        made = prepared(asked({"type": "image", "image": other}), None, grey)[0]["content"][0]["image"]
        assert np.array_equal(np.asarray(made), want)
    with pytest.raises(ValueError, match="can't open the picture"):
        prepared(asked({"type": "image", "image": "nowhere.png"}), None, grey)
    with pytest.raises(ValueError, match="this task has videos"):
        prepared(asked({"type": "video", "video": "file"}), None, grey)


def test_a_digest_is_of_words_and_pictures() -> None:
    def of(words: str = "?", width: int = 5, role: str = "user", **other: Any) -> str:
        shown = other.get("image", picture(width, 3))
        parts = [{"type": "image", "image": shown}, {"type": "text", "text": words}]
        return digest([{"role": role, "content": parts}])

    changed = picture(5, 3)
    changed.putpixel((4, 2), (1, 2, 3))
    found = [of(), of("!"), of(width=6), of(role="assistant"), of(image=changed), of(image="file")]
    assert len(set(found)) == len(found)
    assert of() == of(image=picture(5, 3))
    assert of(image=picture(5, 3).transpose(Image.Transpose.ROTATE_90)) != of()


def test_a_digest_is_of_what_a_file_shows(tmp_path: Path) -> None:
    file, same = tmp_path / "a.png", tmp_path / "b.png"

    def of(shown: str | Path) -> str:
        return digest([{"role": "user", "content": [{"type": "image", "image": shown}]}])

    picture(5, 3).save(file)
    picture(5, 3).save(same)
    found = of(str(file))
    assert of(str(same)) == found
    picture(5, 4).save(file)
    assert of(str(file)) != found


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
    with pytest.raises(ValueError, match=r"chat_template: .*nothing\.jinja is no file here"):
        text_of("chat_template", str(tmp_path / "nothing.jinja"))
    for typed in ("vicuna1", "vicuna-v1", "prompt.txt", "a/b"):
        with pytest.raises(ValueError, match=r"no file here, and none of vicuna_v1"):
            text_of("system_prompt", typed)
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
