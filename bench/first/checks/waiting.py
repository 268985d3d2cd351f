"""Whether the host waits for the GPU between pixels and projected rows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

import ocvtp
from bench.first.checks.setting import Setting
from bench.first.run import Finding
from bench.guard.vlm import small_text, small_vision
from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.encode.encode import encode

_SIDE = 56
_GRIDS = [[56, 112], [112, 56], [112, 112]]
#: Of the images of a call: alike, and not.
_CALLS = {"images of one size": [[60, 100]] * 2, "images of two sizes": [[60, 100], [100, 100]]}


def waiting(setting: Setting) -> Iterator[Finding]:
    """LLaVA-NeXT, tiny: its images have as many tiles as their size asks for."""
    model = _model().half().to(setting.device) if setting.on_gpu else _model()
    pruner = ocvtp.OCPruner(ocvtp.PrunerConfig(in_dim=64, hidden_dim=96, slot_dim=32, ffn_dim=64, layer=2))
    ocvtp.apply(model, pruner.eval().to(setting.device), keep=9)
    controller = controller_of(model)
    for what, sizes in _CALLS.items():
        inputs = _inputs(sizes, model)

        def rows(inputs: dict[str, Any] = inputs) -> torch.Tensor:
            with torch.no_grad():
                return encode(controller.adapter, inputs, controller.settings, None)["image"].flat()

        for _ in range(4):  # as they are, captured, replayed
            want = rows()
        try:
            with _never_waiting(setting):
                got = rows()
        except RuntimeError as error:
            yield {"what": what, "never waits": False, "because": str(error).splitlines()[0][:100]}
            continue
        yield {"what": what, "never waits": True, "same rows": torch.equal(got, want)}


@contextlib.contextmanager
def _never_waiting(setting: Setting) -> Iterator[None]:
    """PyTorch raises where its host would wait for the GPU."""
    if not setting.on_gpu:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _model() -> Any:
    torch.manual_seed(0)
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=small_vision(_SIDE),
            text_config=small_text(),
            image_token_index=120,
            image_grid_pinpoints=_GRIDS,
        )
    ).eval()


def _inputs(sizes: list[list[int]], model: Any) -> dict[str, Any]:
    """As a processor makes them, sizes on the host."""
    most = max(image_size_to_num_patches(size, _GRIDS, _SIDE) for size in sizes)
    shape = len(sizes), most, 3, _SIDE, _SIDE
    pixels = torch.linspace(-1, 1, math.prod(shape)).view(shape).to(model.device, model.dtype)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
