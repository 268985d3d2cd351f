"""``ocvtp serve``: vLLM's own OpenAI server, with a pruned model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ocvtp.commands.errors import UserError, blamed_on_input
from ocvtp.commands.loading import model_source, pruner_source, read_model_config


def words(model: str, settings: Mapping[str, Any], rest: Sequence[str]) -> list[str]:
    """The command that serves ``model``, checked as far as its configuration and the pruner tell.

    Args:
        model: folder or Hub id.
        settings: of :class:`ocvtp.serving.vllm.spec.Spec`, those that were said.
        rest: vLLM's own options.
    """
    from ocvtp.serving.vllm.launch import command, overrides
    from ocvtp_kernels import BackendUnavailableError

    if model.startswith("-"):
        raise UserError(f"give the model first: ocvtp serve MODEL ...; got {model}")
    model = model_source(model, "MODEL")
    if "pruner" in settings:
        settings = {**settings, "pruner": pruner_source(settings["pruner"])}
    config = read_model_config(model, revision=_revision(rest))
    with blamed_on_input(TypeError, ValueError, OSError, BackendUnavailableError):
        return command(model, overrides(config, model, settings), rest)


def _revision(rest: Sequence[str]) -> str | None:
    """The one that vLLM will load."""
    for number, word in enumerate(rest):
        name, equals, value = word.partition("=")
        if name == "--revision":
            return value if equals else next(iter(rest[number + 1 :]), None)
    return None


def check_installed() -> None:
    """Refuse where there is no vLLM, or one that was told to leave us out."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed in this environment: pip install vllm, or --print the command and run it "
            "where vLLM and ocvtp are"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "ocvtp" not in allowed.split(","):
        raise UserError(f"VLLM_PLUGINS is {allowed!r}, so vLLM won't load ocvtp: add it there, or unset it")


def run(command: Sequence[str]) -> None:
    """Become vLLM's server. Does not return."""
    sys.stdout.flush()
    os.execv(sys.executable, in_this_python(command))


def in_this_python(command: Sequence[str]) -> list[str]:
    """``vllm serve ...`` as this environment runs it, whether its ``vllm`` starts or not."""
    return [sys.executable, "-m", *_module(command)]


def _module(command: Sequence[str]) -> list[str]:
    """What ``vllm serve`` runs."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # a build of another name, whose ``vllm`` does not start
        model, *rest = command[2:]
        return ["vllm.entrypoints.openai.api_server", "--model", model, *rest]
    return ["vllm.entrypoints.cli.main", *command[1:]]
