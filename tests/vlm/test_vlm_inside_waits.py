"""How often dropping tokens inside the language model makes the host wait for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from bench.guard.remote import Remote, move, remote_device
from ocvtp.vlm.in_llm import install, uninstall
from tests.vlm.skips import needs_mm_route
from tests.vlm.tiny_inside import METHODS, batch, four, llava


@pytest.fixture(scope="module")
def model() -> Any:
    needs_mm_route()  # older transformers waits in other places
    return move(llava())


@torch.no_grad()
def waits(model: Any, mask: bool) -> tuple[Counter[str], Counter[str]]:
    """Of reading a prompt, and of a token behind it."""
    host = batch(four("llava")[:1])
    inputs = {name: Remote(tensor) for name, tensor in host.items() if mask or name != "attention_mask"}
    for _ in range(2):  # something is made once
        with remote_device() as reading:
            out = model(**inputs, use_cache=True)
    longer = Remote(torch.nn.functional.pad(host["attention_mask"], (0, 1), value=1)) if mask else None
    with remote_device() as decoding:
        model(
            input_ids=Remote(torch.tensor([[5]])),
            attention_mask=longer,
            past_key_values=out.past_key_values,
        )
    return reading, decoding


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mask", [False, True])
def test_the_host_asks_once_for_a_prompt_and_never_while_decoding(model: Any, name: str, mask: bool) -> None:
    plain = waits(model, mask)
    install(model, METHODS[name])
    try:
        found = waits(model, mask)
    finally:
        uninstall(model)
    assert dict(found[0] - plain[0]) == {"tolist": 1}
    assert dict(found[1] - plain[1]) == {}
