"""Every family with weights that accelerate keeps elsewhere, and with LoRA adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ocvtp
from tests.vlm.family import Family, families
from tests.vlm.tiny_llava import GREEDY

# transformers itself reads Idefics3's embeddings outside of the module that has them.
CASES = [pytest.param(family, id=family.name) for family in families() if family.name != "idefics3"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_offloaded_weights(family: Family, kind: str, when: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, batch = family.model(), family.batch()
    ocvtp.apply(model, family.pruner(), keep=family.keep)
    want = model(**batch).logits, model.generate(**batch, **GREEDY)
    if when == "before":
        ocvtp.remove(model)
    here = torch.device("cpu")
    if kind == "cpu":
        accelerate.cpu_offload(model, execution_device=here, offload_buffers=True)
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=here)
    if when == "before":
        ocvtp.apply(model, family.pruner(), keep=family.keep)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(model(**batch).logits, want[0])
    assert torch.equal(model.generate(**batch, **GREEDY), want[1])


def with_lora(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(11)
    config = peft.LoraConfig(r=2, target_modules=r".*(qkv|[qk]_proj)", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("family", [pytest.param(family, id=family.name) for family in families()])
def test_lora(family: Family) -> None:
    """Adapters reach tower, scores and language model, and learn through the kept rows."""
    batch, row = family.batch(), dict(family.rows()["two"])
    merged = with_lora(family.model()).merge_and_unload()
    ocvtp.apply(merged, family.pruner(), keep=family.keep)
    wrapped = with_lora(family.model())
    ocvtp.apply(wrapped, family.pruner(), keep=family.keep)
    live = slice(-4, None)
    with torch.no_grad():
        want, got = merged(**batch).logits[:, live], wrapped(**batch).logits[:, live]
        torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
        with wrapped.disable_adapter():
            assert not torch.allclose(wrapped(**batch).logits[:, live], want, atol=1e-2)
    row["labels"] = torch.where(row["input_ids"] >= 100, -100, row["input_ids"])
    wrapped(**row).loss.backward()
    learned = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(("vision" in name or "visual" in name) and "lora_A" in name for name in learned)
    ocvtp.remove(wrapped)
