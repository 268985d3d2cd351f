"""What vLLM's CPU backend leaves out (0.32; the same code in 0.33). Other backends are not touched."""

from __future__ import annotations

import functools
from typing import Any


def mend_cpu_runner() -> None:
    """Let the CPU runner ask models for their M-RoPE positions, as the GPU runners do after loading.

    ``CPUModelRunner.load_model`` replaces ``GPUModelRunner.load_model`` and forgets the flag, so that
    positions of pruned images would stay unknown (those of vLLM's own pruned videos do).
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load = CPUModelRunner.load_model
    if hasattr(load, "_ocvtp"):
        return

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.model_executor.models.interfaces import supports_multimodal_pruning

        made = load(self, *args, **kwargs)
        config = self.model_config.multimodal_config
        self.is_multimodal_pruning_enabled = bool(
            supports_multimodal_pruning(self.get_model())
            and config
            and config.is_multimodal_pruning_enabled()
        )
        return made

    load_model._ocvtp = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_model
