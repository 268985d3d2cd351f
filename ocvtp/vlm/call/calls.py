"""What the patched ``forward`` and ``generate`` do."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ocvtp.vlm.call.cache_rows import cached_batch
from ocvtp.vlm.call.callbacks import LongView, compared_by_own_type
from ocvtp.vlm.call.columns import with_columns
from ocvtp.vlm.call.controller import Controller
from ocvtp.vlm.call.custom import prompt_in
from ocvtp.vlm.call.embeddings import ids_behind, short_embeddings
from ocvtp.vlm.call.generation import effective, pad_token_id
from ocvtp.vlm.call.inside import check_forward, check_generate, inside
from ocvtp.vlm.call.memory import CacheNote, cached_length, note_of, prefix_of, write_note
from ocvtp.vlm.call.prompt import identity, restore_prompt
from ocvtp.vlm.call.shorten import ShortCall, shorten
from ocvtp.vlm.call.weighing import (
    forget_weights,
    hold_weights,
    leave_weights,
    serving,
    weighing,
    with_running_weights,
    with_weights,
)
from ocvtp.vlm.contracts.versions import transformers_older_than


def forward(
    controller: Controller, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``forward`` on the pruned prompt. Logits, loss and cache are those of the short sequence."""
    if torch.compiler.is_compiling():
        return _forward(controller, original, args, kwargs)
    with serving():
        return _forward(controller, original, args, kwargs)


def _forward(
    controller: Controller, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    cache = controller.argument("forward", "past_key_values", args, kwargs)
    note = note_of(cache)
    pixels = controller.has_pixels("forward", args, kwargs)
    settings = controller.settings
    if pixels:
        check_forward(controller, controller.by_name("forward", args, kwargs))
    if not settings.before:
        with inside(controller, controller.argument("forward", "input_ids", args, kwargs), generating=False):
            return original(*args, **kwargs)
    if note is None and not pixels:
        given = controller.by_name("forward", args, kwargs)
        kwargs = with_running_weights(controller, given, kwargs)
        output = original(*args, **kwargs)
        if cache is None:  # generate of transformers < 5.18 lets the model make the cache
            leave_weights(_cache_in(output), kwargs)
        if settings.columns and cache is None:
            ids = controller.argument("forward", "input_ids", args, kwargs)
            return output if ids is None else with_columns(output, *_unchanged(ids))
        return output
    arguments = controller.by_name("forward", args, kwargs)
    ids, embeddings = arguments.pop("input_ids", None), None
    if pixels and ids is None and isinstance(arguments.get("inputs_embeds"), torch.Tensor):
        embeddings = arguments.pop("inputs_embeds")
        ids = ids_behind(controller.adapter, embeddings, (controller.model,))
    if _is_upstreams_business(ids, arguments, pixels):
        return original(input_ids=ids, **arguments)
    prefix, hold = prefix_of(cache, ids.shape[0], ids.device), hold_weights(controller)
    call = shorten(
        controller.adapter,
        settings,
        ids,
        arguments,
        prefix,
        controller.clock,
        generating=False,
        calling=(controller.model,),
        worded=embeddings is None,
        pad_token_id=pad_token_id(controller.model, arguments),
    )
    write_note(cache, None)
    if embeddings is not None:
        scattered = call.arguments.get("inputs_embeds")
        call.arguments["inputs_embeds"] = short_embeddings(
            controller.adapter, embeddings, call.index, call.ids, scattered
        )
    if "inputs_embeds" not in call.arguments or call.arguments["inputs_embeds"] is None:
        call.arguments["input_ids"] = call.ids
    placed = call.arguments.get("inputs_embeds") is None
    try:
        with inside(controller, call.ids, generating=False, placed=placed):
            output = original(**with_weights(call.arguments, call.note, hold))
    except BaseException:
        _note_failure(cache, note, prefix, ids)
        raise
    filled = _cache_in(output)
    if filled is not None:
        write_note(filled, call.note)
    return with_columns(output, call.index, ids.shape[1]) if settings.columns else output


def generate(
    controller: Controller, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``generate`` on the pruned prompt. Returns the long prompt followed by the new tokens."""
    cache = controller.argument("generate", "past_key_values", args, kwargs)
    # generate reuses a static cache of its own across calls, with the note of an earlier one on it.
    own_cache = getattr(controller.model, "_cache", None)
    if own_cache is not None and own_cache is not cache:
        write_note(own_cache, None)
    note = note_of(cache)
    pixels = controller.has_pixels("generate", args, kwargs)
    if pixels:
        check_generate(controller, controller.by_name("generate", args, kwargs))
    if not controller.settings.before:
        return _unshortened(controller, original, args, kwargs)
    if note is None and not pixels:
        return original(*args, **kwargs)
    arguments = controller.by_name("generate", args, kwargs)
    ids, inputs = arguments.pop("input_ids", None), arguments.pop("inputs", None)
    paged = effective(controller.model, arguments, "cache_implementation") == "paged"
    if paged or (ids is not None and inputs is not None):
        return original(inputs, input_ids=ids, **arguments)
    # Under the caller's name: functions behind custom_generate have parameters of their own.
    name = "inputs" if ids is None else "input_ids"
    ids = inputs if ids is None else ids
    if _is_upstreams_business(ids, arguments, pixels):
        return original(**{name: ids}, **arguments)
    settings, adapter = controller.settings, controller.adapter
    if settings.route == "inputs_embeds" and pixels:
        _refuse_on_embeds_route(controller.model, arguments, cache)
    if arguments.get("attention_mask") is None:
        arguments["attention_mask"] = _inferred_mask(controller.model, ids, arguments)
    copies = _copies(controller.model, arguments)
    prefix, hold = prefix_of(cache, ids.shape[0], ids.device, copies=copies), hold_weights(controller)
    with torch.no_grad():
        call = shorten(
            adapter,
            settings,
            ids,
            arguments,
            prefix,
            controller.clock,
            generating=True,
            pad_token_id=pad_token_id(controller.model, arguments),
            guard=_may_run_without_cache(controller.model, arguments),
        )
    placed = call.arguments.get("inputs_embeds") is None
    if call.note is None:
        with (
            weighing(controller.model, None, None, None),
            inside(controller, call.ids, generating=True, placed=placed),
        ):
            output = original(**{name: call.ids}, **call.arguments)
        return with_columns(output, call.index, ids.shape[1]) if settings.columns else output
    view = LongView(ids, call.ids.shape[1])
    _wrap_callbacks(controller.model, call.arguments, view)
    _shift_lengths(controller.model, call.arguments, view.dropped)
    write_note(cache, None)
    try:
        with (
            compared_by_own_type(controller.model, call.arguments),
            weighing(controller.model, call.note.bias, cache, hold),
            inside(controller, call.ids, generating=True, placed=placed),
        ):
            output = original(**{name: call.ids}, **call.arguments)
    except BaseException:
        _note_failure(cache, note, prefix, ids)
        raise
    output = _restore(output, ids, call, cache)
    return with_columns(output, call.index, ids.shape[1]) if settings.columns else output


def _unshortened(
    controller: Controller, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``generate`` where nothing is dropped before the language model."""
    given = controller.by_name("generate", args, kwargs)
    ids = given.get("input_ids") if given.get("inputs") is None else given["inputs"]
    with inside(controller, ids, generating=True):
        return original(*args, **kwargs)


def _restore(output: Any, ids: torch.Tensor, call: ShortCall, cache: Any) -> Any:
    """The long prompt back in front of the new tokens, and a note on the cache."""
    sequences = output if isinstance(output, torch.Tensor) else getattr(output, "sequences", None)
    start: int | None = 0
    if isinstance(call.arguments.get("custom_generate"), str):
        start = prompt_in(sequences, call.ids)
    if sequences is None or start is None or call.note is None:
        _note_failure(cache, None, None, ids)
        return output
    short = call.ids.shape[1]
    full = torch.cat([sequences[:, :start], restore_prompt(sequences[:, start:], ids, short)], dim=1)
    for filled in (cache, _cache_in(output)):
        if filled is not None:
            forget_weights(filled)
            rows = cached_batch(filled) or sequences.shape[0]  # of beams, not all are returned
            write_note(filled, call.note.grown(rows, sequences.shape[1] - start - short))
    if isinstance(output, torch.Tensor):
        return full
    output.sequences = full
    return output


def _note_failure(cache: Any, note: CacheNote | None, prefix: CacheNote | None, ids: torch.Tensor) -> None:
    """After a failed call: what the cache held before. If it holds something else now, nobody can go on."""
    if not cached_length(cache):
        return
    if prefix is None:
        nothing = identity(ids.shape[0], 0, 0, ids.device)
        write_note(cache, CacheNote(nothing, 0, None))
    elif note is not None:
        write_note(cache, note)
    elif cached_length(cache) != prefix.index.shape[1]:
        write_note(cache, prefix)


def _is_upstreams_business(ids: Any, arguments: Mapping[str, Any], pixels: bool) -> bool:
    """Calls that upstream refuses with a better message than ours; raises for those that only we refuse."""
    if pixels and arguments.get("inputs_embeds") is not None:
        raise ValueError(
            "pixel_values with inputs_embeds can't be pruned in generate, nor with input_ids beside them: "
            "pass input_ids alone, or remove the patch"
        )
    if arguments.get("mm_encoder_outputs") is not None and pixels:
        return True
    return not (isinstance(ids, torch.Tensor) and ids.ndim == 2)


def _unchanged(ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The index of a call that nothing is dropped from, and its columns."""
    return identity(ids.shape[0], 0, ids.shape[1], ids.device), ids.shape[1]


def _cache_in(output: Any) -> Any:
    """The key-value cache in a model's output."""
    if isinstance(output, tuple):
        return next((item for item in output if hasattr(item, "get_seq_length")), None)
    return getattr(output, "past_key_values", None)


def _inferred_mask(model: Any, ids: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """The mask ``generate`` would infer: pad ids are padding unless they are end tokens as well."""
    pad = effective(model, arguments, "pad_token_id")
    if pad is None:
        return None
    ends = effective(model, arguments, "eos_token_id")
    ends = [ends] if isinstance(ends, int) else (list(ends) if ends is not None else [])
    if pad in ends or not bool((ids == pad).any()):
        return None
    return (ids != pad).long()


def _may_run_without_cache(model: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether transformers may attend without a cache: told to, or for gradient checkpointing."""
    return model.training or effective(model, arguments, "use_cache") is False


def _refuse_on_embeds_route(model: Any, arguments: Mapping[str, Any], cache: Any) -> None:
    if cached_length(cache) and transformers_older_than("5.3"):
        raise ValueError("an image behind a non-empty cache needs transformers >= 5.3 to be pruned")
    if "inputs_embeds" not in inspect.signature(model.prepare_inputs_for_generation).parameters:
        raise ValueError(
            "prepare_inputs_for_generation of this model was replaced, as PEFT does for trained prompts: "
            "generate takes no embeddings then, and token pruning can do without from transformers 5.18 on"
        )
    for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
        value = arguments.get(name) if name == "assistant_model" else effective(model, arguments, name)
        if value is not None:
            raise ValueError(
                f"{name} with token pruning needs transformers >= 5.18; older ones lose image tokens"
            )
    for name, nothing in (("encoder_repetition_penalty", 1.0), ("encoder_no_repeat_ngram_size", 0)):
        if effective(model, arguments, name) not in (None, nothing):
            raise ValueError(
                f"{name} with token pruning needs transformers >= 5.18; older ones don't see the prompt's "
                "tokens behind embeddings"
            )


def _copies(model: Any, arguments: Mapping[str, Any]) -> int:
    """How often ``generate`` repeats each prompt."""
    return max(effective(model, arguments, name) or 1 for name in ("num_beams", "num_return_sequences"))


def _wrap_callbacks(model: Any, arguments: dict[str, Any], view: LongView) -> None:
    from transformers import LogitsProcessorList, StoppingCriteriaList

    if arguments.get("stopping_criteria") is not None:
        criteria = [view.criterion(item) for item in arguments["stopping_criteria"]]
        arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
    if arguments.get("logits_processor") is not None:
        processors = [view.processor(item) for item in arguments["logits_processor"]]
        arguments["logits_processor"] = LogitsProcessorList(processors)
    if arguments.get("prefix_allowed_tokens_fn") is not None:
        copies = _copies(model, arguments) // (effective(model, arguments, "num_beams") or 1)
        function = arguments["prefix_allowed_tokens_fn"]
        arguments["prefix_allowed_tokens_fn"] = view.prefix_function(function, copies)
    if arguments.get("streamer") is not None:
        arguments["streamer"] = view.streamer(arguments["streamer"])


def _shift_lengths(model: Any, arguments: dict[str, Any], dropped: int) -> None:
    """Let ``max_length`` and ``min_length`` go on counting the long prompt; never in the user's config."""
    for name, overruled_by in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if effective(model, arguments, overruled_by) is not None:
            continue
        if arguments.get(name) is not None:
            arguments[name] = max(0, arguments[name] - dropped)
            continue
        config = arguments.get("generation_config")
        value = getattr(config, name, None)
        if value is None:
            value = _default_length(model, name)
        if value is None:
            continue
        if config is None:
            arguments[name] = max(0, value - dropped)
        else:
            arguments["generation_config"] = config = copy.deepcopy(config)
            setattr(config, name, max(0, value - dropped))


def _default_length(model: Any, name: str) -> int | None:
    """A length in the model's own generation config, where it counts the prompt."""
    if name == "max_length" and transformers_older_than("5.3"):  # there, it counts new tokens
        return None
    return getattr(model.generation_config, name, None)
