"""A capture that can't succeed: with CUDA_LAUNCH_BLOCKING=1, or because something in it waits."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from bench.first.checks.setting import Setting
from bench.first.run import Finding
from ocvtp.pruner import OCPruner, PrunerConfig
from ocvtp.pruner.capture import SlotRunner


def stream(setting: Setting) -> Iterator[Finding]:
    """Let the runner capture; afterwards this thread has to be on the stream it was on, and right."""
    widths = setting.widths
    config = PrunerConfig(
        in_dim=widths.features, hidden_dim=widths.hidden, slot_dim=widths.slots, ffn_dim=widths.mlp
    )
    pruner = OCPruner(config).eval().to(setting.device)
    runner = SlotRunner()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, setting.tokens, widths.features, generator=draw).to(setting.device)
    before = _current(setting)
    same, right = True, True
    want = pruner.assign(x, setting.slots).select().indices
    for _ in range(5):
        got = runner.begin(pruner, x, setting.slots).get().select().indices
        same = same and _current(setting) == before
        right = right and torch.equal(got, want)
    yield {
        "what": f"capture with CUDA_LAUNCH_BLOCKING={os.environ.get('CUDA_LAUNCH_BLOCKING', '0')}",
        "same stream": same,
        "right tokens": right,
        "graphs": runner.graphs,
    }
    runner.close()


def _current(setting: Setting) -> object:
    return torch.cuda.current_stream(setting.device) if setting.on_gpu else None
