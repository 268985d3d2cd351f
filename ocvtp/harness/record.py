"""What a run was: settings as resolved, what they apply to, and by which versions."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Mapping
from typing import Any

import torch

from ocvtp import __version__
from ocvtp.harness.arguments import NONE, PASSED, Arguments
from ocvtp.harness.results import FREE
from ocvtp.stored.seal import tensor_digest
from ocvtp.vlm import PruneReport
from ocvtp.vlm.options import Options
from ocvtp.vlm.rivals import ClipText

_PACKAGES = ("torch", "transformers", "lmms_eval", "accelerate", "torchvision", "pillow")
#: Numbers of a parameter that a model's fingerprint reads.
_SAMPLE = 16
_defaults = {each.name: each.default for each in dataclasses.fields(Options)}


def record_of(
    arguments: Arguments,
    model: Any,
    chooser: Any,
    report: PruneReport | None,
    system: str | None,
    processor: Any,
) -> dict[str, Any]:
    """JSON-ready, but for what is measured later.

    Args:
        arguments: of the run.
        model: that answers.
        chooser: who prunes it, as :func:`ocvtp.apply` took it.
        report: what that made of it; ``None``: the model is as it was.
        system: what the system says.
        processor: of the model, set up.
    """
    settings = dataclasses.asdict(arguments)
    said = settings.pop("options")
    options = {} if report is None else {name: _defaults[name] for name in PASSED} | said
    resolved: dict[str, Any] = {} if report is None else dataclasses.asdict(report)
    for name in ("merge", "weigh", "positions", "precision", "backend"):
        if name in resolved:
            options[name] = resolved[name]
    settings |= {
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": str(model.config.get_text_config()._attn_implementation),
        "system_prompt": system,
        "chat_template": processor.chat_template,
    }
    if arguments.pruner == NONE:
        settings["keep"] = None
    text = getattr(chooser, "text", None)
    return {
        "ocvtp": __version__,
        "settings": {**settings, **options},
        "report": resolved or None,
        "pruner": {
            "name": arguments.pruner,
            "sha256": fingerprint(chooser) if isinstance(chooser, torch.nn.Module) else None,
        },
        "model": {
            "name": arguments.pretrained,
            "commit": getattr(model.config, "_commit_hash", None),
            "sample_sha256": sampled_fingerprint(model),
            "config_sha256": _digest(_config(model.config)),
        },
        "text_encoder_sha256": sampled_fingerprint(text.model) if isinstance(text, ClipText) else None,
        "processor": {
            "sha256": _processor(processor),
            "image_processor": _plain(_without_versions(processor.image_processor.to_dict())),
        },
        "generation": _plain(_without_versions(model.generation_config.to_diff_dict())),
        "versions": versions(),
        "device": _device(model),
    }


def deciding(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that has a say in the answers: what a journal is held to."""
    settings = {name: value for name, value in record["settings"].items() if name not in FREE}
    return {
        "settings": settings | {"pretrained": None, "pruner": None},  # folders may move; weights are compared
        "report": record["report"],
        "pruner": record["pruner"]["sha256"] or record["pruner"]["name"],
        "model": [record["model"]["sample_sha256"], record["model"]["config_sha256"]],
        "text_encoder": record["text_encoder_sha256"],
        "processor": record["processor"],
        "generation": record["generation"],
        "versions": record["versions"],
    }


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 of a module's state: names, shapes, dtypes and every byte."""
    return _digest({name: tensor_digest(tensor) for name, tensor in module.state_dict().items()})


def sampled_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of some numbers of every parameter: of a large model, in no time.

    Tells other weights, not every change of one number. Offloaded parameters count by name and shape.
    """
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return _digest({name: [tensor.shape, str(tensor.dtype), _sampled(tensor)] for name, tensor in named})


def _sampled(tensor: torch.Tensor) -> str | None:
    if tensor.is_meta or not tensor.numel():
        return None
    flat = tensor.detach().reshape(-1)
    return tensor_digest(flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE])


def versions() -> dict[str, str]:
    """Of what has a say in the answers, as far as it is installed."""
    found = {"ocvtp": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor(processor: Any) -> str:
    """Of everything that makes inputs of words and pictures."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    images = _without_versions(processor.image_processor.to_dict())
    own = {
        name: value
        for name, value in vars(processor).items()
        if isinstance(value, (int, float, str, bool, type(None))) and name != "chat_template"
    }
    return _digest([words, images, own, processor.chat_template])


def _config(config: Any) -> dict[str, Any]:
    """What a configuration says, but where it came from and who wrote it."""
    found = _without_versions(config.to_diff_dict())
    return {name: value for name, value in found.items() if name not in ("_name_or_path", "dtype")}


def _without_versions(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "transformers_version"}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """JSON-ready."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def _device(model: Any) -> str:
    device = model.device
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}"
    return str(device.type)
