"""The model, its processor and who prunes it. Cheap checks first: a model takes long to load."""

from __future__ import annotations

from typing import Any, get_args

import torch

from ocvtp.harness.arguments import NONE, Arguments, inside_of, rival_of
from ocvtp.harness.conversations import text_of
from ocvtp.methods.in_llm import Inside
from ocvtp.vlm import PruneReport, apply
from ocvtp.vlm.contracts.reducer import Rival
from ocvtp.vlm.contracts.selector import Rule
from ocvtp.vlm.options import Options
from ocvtp.vlm.resolving import resolve
from ocvtp.vlm.skeleton import skeleton_of


def load_processor(arguments: Arguments) -> Any:
    """The processor, with a chat template and padding in front.

    Raises:
        OSError: there is none.
        ValueError: it has no chat template, and none was given, or it lacks what an argument sets.
    """
    from transformers import AutoProcessor

    size = {name: getattr(arguments, name) for name in ("min_pixels", "max_pixels")}
    processor = AutoProcessor.from_pretrained(
        arguments.pretrained,
        revision=arguments.revision,
        **{name: value for name, value in size.items() if value is not None},
    )
    processor.tokenizer.padding_side = "left"
    if arguments.chat_template is not None:
        processor.chat_template = text_of("chat_template", arguments.chat_template)
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"the processor of {arguments.pretrained} has no chat template: give chat_template=FILE"
        )
    if arguments.batch_size > 1 and processor.tokenizer.pad_token_id is None:
        raise ValueError(
            f"batch_size={arguments.batch_size} needs a padding token, which the tokenizer has not"
        )
    images = processor.image_processor
    if arguments.image_grid_pinpoints is not None:
        if not hasattr(images, "image_grid_pinpoints"):
            raise ValueError("image_grid_pinpoints is for models that cut pictures into tiles (LLaVA-NeXT)")
        images.image_grid_pinpoints = arguments.image_grid_pinpoints
    if arguments.pad_to_square and getattr(images, "image_mean", None) is None:
        raise ValueError("pad_to_square needs the mean colour, which this image processor has not")
    return processor


def plan(arguments: Arguments, decode: Any) -> tuple[Any, Any]:
    """``(configuration, who prunes)``, checked against each other: no weights of the model are loaded.

    Args:
        arguments: of the run.
        decode: ids of the language model to text.

    Raises:
        OSError: no such model or pruner.
        TypeError, ValueError: a pruner or an argument that does not fit the model; the message names it.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(arguments.pretrained, revision=arguments.revision)
    if arguments.image_grid_pinpoints is not None:
        if not hasattr(config, "image_grid_pinpoints"):
            raise ValueError("image_grid_pinpoints is for models that cut pictures into tiles (LLaVA-NeXT)")
        config.image_grid_pinpoints = arguments.image_grid_pinpoints
    kind = {}
    if arguments.attn_implementation is not None:
        kind["attn_implementation"] = arguments.attn_implementation
    adapter = skeleton_of(config, **kind)
    chooser = None if arguments.unpruned else chooser_of(arguments, decode)
    if not arguments.unpruned:
        resolve(adapter, Options(chooser, **options_of(arguments)))
    return config, chooser


def chooser_of(arguments: Arguments, decode: Any) -> Any:
    """Who prunes, as :func:`ocvtp.apply` takes it."""
    name = arguments.pruner
    if name == NONE:
        return None
    if name in get_args(Rival) and (arguments.settings is not None or arguments.text_encoder is not None):
        text = None
        if arguments.text_encoder is not None:
            from ocvtp.vlm.rivals import ClipText

            text = ClipText.load(arguments.text_encoder, decode=decode)
        return rival_of(name, arguments.settings, text)
    if name in (*get_args(Rule), *get_args(Rival), *get_args(Inside)):
        return name
    from ocvtp.pruner.sources import read_pruner

    return read_pruner(name, arguments.layer).eval()


def options_of(arguments: Arguments) -> dict[str, Any]:
    """What else :func:`ocvtp.apply` is told."""
    if arguments.pruner == NONE:
        return {"inside": inside_of(arguments.inside), **arguments.options}
    given = {"keep": arguments.keep, **arguments.options}
    if arguments.inside is not None:
        given["inside"] = inside_of(arguments.inside)
    return given


def load_model(arguments: Arguments, config: Any, device: torch.device) -> Any:
    """The model in evaluation mode, on ``device`` or where ``device_map`` puts it."""
    from transformers import AutoModelForImageTextToText

    kind: dict[str, Any] = {}
    for name in ("attn_implementation", "device_map"):
        if getattr(arguments, name) is not None:
            kind[name] = getattr(arguments, name)
    model = AutoModelForImageTextToText.from_pretrained(
        arguments.pretrained, config=config, revision=arguments.revision, dtype=arguments.dtype, **kind
    )
    return (model if "device_map" in kind else model.to(device)).eval()


def prune(arguments: Arguments, model: Any, chooser: Any) -> PruneReport | None:
    """Patch the model; ``None`` where it stays as it is, in which case nothing of it is touched."""
    return None if arguments.unpruned else apply(model, chooser, **options_of(arguments))
