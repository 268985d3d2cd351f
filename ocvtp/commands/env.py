"""``ocvtp env``: what is installed and what will run; the first thing a bug report needs."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
from importlib.metadata import PackageNotFoundError, version

import ocvtp

_PACKAGES = ("torch", "triton", "transformers", "huggingface_hub", "safetensors", "numpy", "pillow")
_ROUTES_SINCE = (5, 18)  # transformers hands encoded images through generate since then


def collect() -> dict[str, str]:
    """Name -> value, in the order to print."""
    facts = {"ocvtp": ocvtp.__version__, "python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        facts[package] = _version(package)
    facts["devices"] = _devices()
    facts["kernel backend"] = _backend()
    facts["image hand-over"] = _route(facts["transformers"])
    return facts


def _version(package: str) -> str:
    try:
        if package == "torch":  # its own version names the CUDA it was built for
            return str(importlib.import_module("torch").__version__)
        return version(package)
    except (PackageNotFoundError, ImportError):
        return "absent"


def _devices() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown: torch is absent"
    import torch

    names = [f"cpu ({torch.get_num_threads()} threads)"]
    names += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def _backend() -> str:
    if importlib.util.find_spec("torch") is None:
        return "none: torch is absent"
    import torch

    from ocvtp_kernels._arch import architecture, why_no_kernels

    if not torch.cuda.is_available():
        return "torch (PyTorch reference; Triton kernels need a CUDA or ROCm GPU)"
    device = torch.device("cuda")
    reason = why_no_kernels(device)
    if reason is None:
        return f"triton ({architecture(device)} tiles) for selection and received attention, else torch"
    return f"torch (PyTorch reference: {reason})"


def _route(transformers: str) -> str:
    if transformers == "absent":
        return "none: transformers is absent"
    release = re.match(r"(\d+)\.(\d+)", transformers)  # "5.19.0.dev0" and "6.0rc1" too
    if release is not None and tuple(map(int, release.groups())) >= _ROUTES_SINCE:
        return "mm_encoder_outputs"
    return "inputs_embeds (assisted decoding and chunked prefill need transformers >= 5.18)"
