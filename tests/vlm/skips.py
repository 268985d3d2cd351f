"""Skips shared by the patch's tests."""

from __future__ import annotations

import pytest
import transformers
from packaging.version import Version

from ocvtp.vlm.call.handover import route_of
from tests.vlm.tiny_llava import llava

VERSION = Version(transformers.__version__)
NATIVE_ROUTE = route_of(llava())


def needs_mm_route() -> None:
    if NATIVE_ROUTE != "mm_encoder_outputs":
        pytest.skip("needs mm_encoder_outputs: transformers >= 5.18")


def needs_original() -> None:
    if Version("5.10") > VERSION:
        pytest.skip('positions="original" needs transformers >= 5.10')


def needs_chunked_prefill() -> None:
    if Version("5.23") > VERSION:
        pytest.skip("before transformers 5.23, chunked prefill answers unlike greedy, unpatched as well")


#: Older ones feed all embeddings again behind a cache.
IMAGES_BEHIND_CACHE = Version("5.3") <= VERSION


def needs_images_behind_cache() -> None:
    if not IMAGES_BEHIND_CACHE:
        pytest.skip("an image behind a cache needs transformers >= 5.3")
