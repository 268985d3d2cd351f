"""No number of images has kernels compiled for it that one image has not."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from bench.batches import CALLS
from tests.test_aot import run

FIND = """
import json
from bench.batches import compiled_anew
places = [(arch, kept) for arch in ("sm90", "gfx942") for kept in (64, 100)]
found = [(arch, kept, compiled_anew(arch, kept, (2, 3, 16, 64))) for arch, kept in places]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    """In a process of its own, as interpreted kernels are not specialised."""
    result = run("-c", FIND)
    assert result.returncode == 0, result.stderr
    return {
        name: [
            f"{arch} K={kept}: {one}" for arch, kept, anew in json.loads(result.stdout) for one in anew[name]
        ]
        for name in CALLS
    }


@pytest.mark.parametrize("name", CALLS)
def test_no_batch_is_compiled_for_anew(name: str, found: dict[str, list[str]]) -> None:
    assert not found[name]
