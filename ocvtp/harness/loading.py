"""The model, its processor and who prunes it. Cheap checks first: a model takes long to load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, get_args

import torch

from ocvtp.harness.answering import tokenized
from ocvtp.harness.arguments import NONE, Arguments, inside_of, reads_text, rival_of
from ocvtp.harness.conversations import prepared, text_of
from ocvtp.methods.in_llm import Inside
from ocvtp.vlm import PruneReport, apply
from ocvtp.vlm.contracts.reducer import LLAVA, Rival
from ocvtp.vlm.contracts.selector import Rule
from ocvtp.vlm.options import Options
from ocvtp.vlm.resolving import resolve
from ocvtp.vlm.skeleton import skeleton_of

_NO_TILES = "image_grid_pinpoints is for models that cut pictures into tiles (LLaVA-NeXT)"


def load_processor(arguments: Arguments, system: str | None) -> Any:
    """The processor, with a chat template and padding in front.

    Args:
        arguments: of the run.
        system: what the system is to say.

    Raises:
        ValueError: there is none, or none with a chat template, and none was given, or it lacks what an
            argument sets.
    """
    from transformers import AutoProcessor

    size = {name: getattr(arguments, name) for name in ("min_pixels", "max_pixels")}
    with _naming("pretrained"):
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
    if system is not None:
        check_system(processor, system)
    images = processor.image_processor
    if arguments.image_grid_pinpoints is not None:
        if not hasattr(images, "image_grid_pinpoints"):
            raise ValueError(_NO_TILES)
        images.image_grid_pinpoints = arguments.image_grid_pinpoints
    if arguments.pad_to_square and getattr(images, "image_mean", None) is None:
        raise ValueError("pad_to_square needs the mean colour, which this image processor has not")
    return processor


def check_system(processor: Any, system: str) -> None:
    """Raise ``ValueError`` if the chat template has no place for what the system says."""
    question: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    try:
        written = processor.apply_chat_template(prepared(question, system, None), tokenize=False)
    except Exception as error:  # a template can raise anything
        raise ValueError(f"system_prompt: the chat template refuses a system's words: {error}") from error
    times = str(written).count(system)
    if times != 1:
        said = f"says a system's words {times} times" if times else "leaves a system's words out"
        raise ValueError(f"system_prompt: the chat template {said}: give chat_template=FILE, or leave it out")


def check_prompt(processor: Any, config: Any) -> None:
    """Ask about a grey picture, so that what can't be processed is told before a question.

    Raises:
        ValueError: the processor fails, or puts no picture into the prompt.
    """
    from PIL import Image

    picture = Image.new("RGB", (64, 48), (127, 127, 127))
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]
    try:
        made = tokenized(processor, [prepared([{"role": "user", "content": parts}], None, None)])
    except Exception as error:  # of a processor that is not set up, nearly anything
        raise ValueError(
            f"the processor can't process a question about a picture ({type(error).__name__}: {error}): "
            "see to its configuration, or give chat_template=FILE"
        ) from error
    if not bool((made["input_ids"] == config.image_token_id).any()):
        raise ValueError(
            "the chat template puts no picture into the prompt: give chat_template=FILE with one that does"
        )


def plan(arguments: Arguments, processor: Any) -> tuple[Any, Any]:
    """``(configuration, who prunes)``, checked against each other: no weights of the model are loaded.

    Args:
        arguments: of the run.
        processor: of the model.

    Raises:
        TypeError, ValueError: no such model or pruner, or an argument that does not fit the model, which the
            message names.
    """
    from transformers import AutoConfig

    with _naming("pretrained"):
        config = AutoConfig.from_pretrained(arguments.pretrained, revision=arguments.revision)
    if arguments.image_grid_pinpoints is not None:
        if not hasattr(config, "image_grid_pinpoints"):
            raise ValueError(_NO_TILES)
        config.image_grid_pinpoints = arguments.image_grid_pinpoints
    for name in ("min_pixels", "max_pixels"):
        if getattr(arguments, name) is not None and not config.model_type.startswith("qwen"):
            raise ValueError(f"{name} is for Qwen's image processors, not for {config.model_type}")
    kind = {}
    if arguments.attn_implementation is not None:
        kind["attn_implementation"] = arguments.attn_implementation
    adapter = skeleton_of(config, **kind)
    check_prompt(processor, config)
    _check_text(arguments, config)
    chooser = None if arguments.unpruned else chooser_of(arguments, processor.tokenizer.decode)
    if not arguments.unpruned:
        resolve(adapter, Options(chooser, **options_of(arguments)))
    return config, chooser


def _check_text(arguments: Arguments, config: Any) -> None:
    """Raise ``ValueError`` for a method that reads the question, and nothing to read it with."""
    if not reads_text(arguments.pruner) or arguments.text_encoder is not None:
        return
    if config.model_type in LLAVA and "text" not in (arguments.settings or {}):
        raise ValueError(
            f"text_encoder: {arguments.pruner} compares pictures with questions, and {config.model_type} has "
            "no text tower: give text_encoder= the CLIP checkpoint that its vision tower was taken from "
            "(LLaVA-1.5 and LLaVA-NeXT: openai/clip-vit-large-patch14-336), or "
            'settings={"text":"language_model"}, an adaptation'
        )


def chooser_of(arguments: Arguments, decode: Any) -> Any:
    """Who prunes, as :func:`ocvtp.apply` takes it."""
    name = arguments.pruner
    if name == NONE:
        return None
    if name in get_args(Rival) and (arguments.settings is not None or arguments.text_encoder is not None):
        text = None
        if arguments.text_encoder is not None:
            from ocvtp.vlm.rivals import ClipText

            with _naming("text_encoder"):
                text = ClipText.load(arguments.text_encoder, decode=decode)
        return rival_of(name, arguments.settings, text)
    if name in (*get_args(Rule), *get_args(Rival), *get_args(Inside)):
        return name
    from ocvtp.pruner.sources import read_pruner

    with _naming("pruner"):
        return read_pruner(name, arguments.layer).eval()


def options_of(arguments: Arguments) -> dict[str, Any]:
    """What else :func:`ocvtp.apply` is told."""
    if arguments.pruner == NONE:
        return {"inside": inside_of(arguments.inside), **arguments.options}
    given = {"keep": arguments.keep, **arguments.options}
    if arguments.inside is not None:
        given["inside"] = inside_of(arguments.inside)
    return given


@contextlib.contextmanager
def _naming(argument: str) -> Iterator[None]:
    """Put an argument's name in front of what is wrong with it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: {error}") from error


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
