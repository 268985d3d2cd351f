"""How vLLM is to run in the process of the tests."""

from __future__ import annotations

import os

#: Engines one after another in one process, nothing said but errors, nothing reported, nothing downloaded.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


def prepare() -> None:
    """Set what vLLM reads from the environment when it is imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
