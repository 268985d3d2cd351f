"""Every family, from a folder as the Hub has it: the tokens that transformers generates, in any batch."""

from __future__ import annotations

import importlib.util

import pytest
from packaging.version import Version

from tests.vlm.hub_families import FAMILIES, Family
from tests.vlm.hub_folders import write_folder
from tests.vlm.skips import VERSION

pytest.importorskip("lmms_eval", reason="needs lmms-eval: make test-eval")

from tests.harness.lmms.talks import QUESTIONS, Case, answers, by_transformers, talk

pytestmark = pytest.mark.usefixtures("tokens_are_told")

TORCHVISION = importlib.util.find_spec("torchvision") is not None
KEEP = 0.25
#: For processors without a chat template.
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    found = FAMILIES[request.param]
    if Version(found.since) > VERSION:
        pytest.skip(f"needs transformers >= {found.since}")
    if not TORCHVISION and (found.video or Version(found.pillow) > VERSION):
        pytest.skip("its processor needs torchvision")
    return found


@pytest.fixture(scope="module")
def case(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("hub")
    folder = write_folder(root, next(name for name, each in FAMILIES.items() if each is family))
    asked, template = QUESTIONS, None
    if not family.chat:  # PaliGemma's; and its processor takes one picture, and no question without
        asked = {text: sizes for text, sizes in QUESTIONS.items() if len(sizes) == 1}
        template = root / "template.jinja"
        template.write_text(TEMPLATE, encoding="utf-8")
    return Case(folder, template, [talk(text, sizes) for text, sizes in asked.items()])


def test_unpruned_it_is_transformers(case: Case) -> None:
    want, read = by_transformers(case)
    assert len({tuple(row) for row in want}) > 2  # a model that says one thing would prove nothing
    for batch_size in (1, 3):
        got, counts = answers(case, "pruner=none", batch_size)
        assert got == want
        assert [each["input_tokens"] for each in counts] == read
        assert [each["output_tokens"] for each in counts] == [len(row) for row in want]
        assert [each["images"] for each in counts] == case.pictures()
        assert [each["kept_vision_tokens"] for each in counts] == [each["vision_tokens"] for each in counts]


def test_pruned_it_is_the_patch(family: Family, case: Case) -> None:
    long = by_transformers(case)[1]
    want, read = by_transformers(case, keep=KEEP)
    for batch_size in (1, 3):
        got, counts = answers(case, f"keep={KEEP}", batch_size)
        assert got == want
        for each, before, after, pictures in zip(counts, long, read, case.pictures(), strict=True):
            assert each["input_tokens"] == after
            assert each["vision_tokens"] - each["kept_vision_tokens"] == before - after
            share = KEEP * each["vision_tokens"]
            if "image_grid_pinpoints" in family.config:  # newlines are not chosen among; one of each stays
                assert 0.8 * share <= each["kept_vision_tokens"] <= share + pictures
            else:
                assert abs(each["kept_vision_tokens"] - share) <= pictures / 2
            assert (each["vision_tokens"] > 0) == (pictures > 0)
