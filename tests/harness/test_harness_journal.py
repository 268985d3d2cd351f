"""Answers on disk: what a kill leaves is read back, and nothing else is."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from ocvtp.harness.journal import Journal

SETTINGS: dict[str, Any] = {
    "settings": {"keep": 28, "merge": "off"},
    "pruner": "abc",
    "versions": {"torch": "2"},
}


def answers(*keys: str) -> list[tuple[str, dict[str, Any]]]:
    return [(key, {"text": f"said {key}\n\u2028é", "images": 1}) for key in keys]


def filled(folder: Path, rank: int, *batches: tuple[str, ...]) -> None:
    journal = Journal(str(folder), SETTINGS)
    for batch in batches:
        journal.add(rank, answers(*batch))
    journal.close()


def test_it_goes_on_whoever_wrote_it(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "answers"
    filled(folder, 0, ("a", "b"), ("c",))
    filled(folder, 1, ("d",))
    journal = Journal(str(folder), SETTINGS)
    assert len(journal) == 4
    assert [journal.get(key) for key in "abcd"] == [answer for _, answer in answers(*"abcd")]
    assert journal.get("e") is None
    journal.add(0, answers("e"))
    journal.close()
    assert len(Journal(str(folder), SETTINGS)) == 5


@pytest.mark.parametrize("left", [1, 30, -3])
def test_what_a_kill_cut_off_is_asked_again(tmp_path: Path, left: int) -> None:
    filled(tmp_path, 0, ("a", "b"), ("c", "d"))
    file = tmp_path / "0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1] + lines[2][:left])
    journal = Journal(str(tmp_path), SETTINGS)
    assert len(journal) == 2
    assert journal.get("c") is None
    journal.add(0, answers("c", "d"))
    journal.close()
    assert file.read_bytes() == b"".join(lines)


def test_a_kill_within_the_first_line(tmp_path: Path) -> None:
    filled(tmp_path, 0, ("a",))
    file = tmp_path / "0.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:10])
    filled(tmp_path, 0, ("a",))
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": {"keep": 56, "merge": "off"}}, "settings.keep"),
        ({"pruner": "abd"}, "pruner"),
        ({"versions": {"torch": "3"}}, "versions.torch"),
        ({"settings": {"keep": 28, "merge": "off", "system_prompt": "x"}}, "settings.system_prompt"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    filled(tmp_path, 3, ("a",))
    before = (tmp_path / "3.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"other settings \({named}\): give another folder"):
        Journal(str(tmp_path), {**SETTINGS, **change})
    assert (tmp_path / "3.jsonl").read_bytes() == before


def test_settings_are_compared_as_json_has_them(tmp_path: Path) -> None:
    Journal(str(tmp_path), {"sizes": (1, 2)}).add(0, answers("a"))
    assert len(Journal(str(tmp_path), {"sizes": [1, 2]})) == 1


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"answers": 3}', b'{"answers": [{"text": "x"}]}', b"{}", b""]
)
def test_damage_is_told_with_its_place(tmp_path: Path, line: bytes) -> None:
    filled(tmp_path, 0, ("a",))
    with (tmp_path / "0.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ValueError, match=r"line 3 of .*0\.jsonl is damaged"):
        Journal(str(tmp_path), SETTINGS)


def test_two_writers_of_one_rank_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first, second = (Journal(str(tmp_path), SETTINGS) for _ in range(2))
    first.add(0, answers("a"))
    with pytest.raises(ValueError, match="another process is writing"):
        second.add(0, answers("b"))
    second.add(1, answers("b"))
    first.close()
    second.close()
    assert len(Journal(str(tmp_path), SETTINGS)) == 2


def test_a_folder_that_another_run_began_meanwhile_is_refused(tmp_path: Path) -> None:
    late = Journal(str(tmp_path), {**SETTINGS, "pruner": "other"})
    filled(tmp_path, 0, ("a",))
    before = (tmp_path / "0.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(pruner\)"):
        late.add(0, answers("b"))
    assert (tmp_path / "0.jsonl").read_bytes() == before


def test_a_file_system_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    filled(tmp_path, 0, ("a",))
    assert len(Journal(str(tmp_path), SETTINGS)) == 1


def test_nothing_is_written_before_there_is_an_answer(tmp_path: Path) -> None:
    Journal(str(tmp_path / "answers"), SETTINGS).close()
    assert list((tmp_path / "answers").iterdir()) == []


def test_a_line_is_json_that_others_can_read(tmp_path: Path) -> None:
    filled(tmp_path, 0, ("a",))
    first, second = (tmp_path / "0.jsonl").read_text().splitlines()
    assert json.loads(first) == {"settings": SETTINGS}
    assert json.loads(second)["answers"][0]["key"] == "a"
