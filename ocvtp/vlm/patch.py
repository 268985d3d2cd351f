"""Installing and removing the patch on one model instance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from ocvtp.methods.in_llm import Inside, Method
from ocvtp.pruner.topup import Fill
from ocvtp.selection import Selection
from ocvtp.vlm.call import calls
from ocvtp.vlm.call.controller import ATTRIBUTE, controller_of, unwrap
from ocvtp.vlm.contracts.errors import PatchError
from ocvtp.vlm.contracts.reducer import Reducer, Rival
from ocvtp.vlm.contracts.selector import DEFAULT_RULE, Rule
from ocvtp.vlm.contracts.settings import Frames, Layout, Merge, Newlines, Settings, Tower
from ocvtp.vlm.encode.encode import choose
from ocvtp.vlm.families import adapter_for
from ocvtp.vlm.methods import Run, install, resettle, uninstall
from ocvtp.vlm.options import Options
from ocvtp.vlm.report import PruneReport
from ocvtp.vlm.resolving import resolve
from ocvtp.watch import OnInvalid

_PATCHED: dict[str, Run] = {"forward": calls.forward, "generate": calls.generate}


def apply(
    model: Any,
    pruner: torch.nn.Module | Rule | Rival | Inside | Reducer | None = DEFAULT_RULE,
    keep: int | float | Literal["auto"] = 64,
    positions: Literal["compact", "original", "auto"] = "auto",
    *,
    seed: int = 0,
    backend: str = "auto",
    precision: str = "auto",
    capture: bool | Literal["vision"] = True,
    refine: int = 0,
    max_error: float | None = None,
    budgets: Sequence[int] | None = None,
    layout: Layout = "layout",
    newlines: Newlines = "last",
    frames: Frames = "each",
    tower: Tower = "exact",
    columns: bool = False,
    merge: Merge | Literal["auto"] = "auto",
    weigh: bool | Literal["auto"] = "auto",
    features: int | Literal["auto", "early", "consumed"] = "auto",
    fill: Fill | Literal["auto"] = "auto",
    inside: Method | None = None,
    on_invalid: OnInvalid = "raise",
) -> PruneReport:
    """Patch a vision-language model in place, so that ``forward`` and ``generate`` prune image tokens.

    Nothing changes for the caller: same inputs from the same processor, and ``generate`` returns the full
    prompt followed by the new tokens. Calls without pixels are untouched. ``forward`` returns the logits of
    the short sequence. Who brings pixels to ``model.model`` itself, as a fused loss does, runs on it too, and
    gets states of the long one (transformers >= 5.18; refused before): each column those of the last kept
    column at or before it. Applying again replaces the settings. The patch is on this instance alone; it
    survives ``copy.deepcopy`` and leaves no trace in ``state_dict`` and ``save_pretrained``. Image features
    that the caller computes with ``get_image_features`` are not pruned, and forward hooks on the vision
    tower as a whole don't fire (those on its layers do).

    Args:
        model: a ``...ForConditionalGeneration`` of a family in ``docs/models.md``, or a PEFT or
            ``torch.compile`` wrapper around one.
        pruner: an :class:`~ocvtp.OCPruner` for the tower's width and token unit, moved to the tower's device
            on use, so models on two devices need a copy each; or a rule without training: ``"attention"``,
            ``"random"``, ``"grid"``, or one that compares ``features``: ``"farthest_point"`` or
            ``"greedy_dpp"``. The last answered best of all where we could measure it (``docs/accuracy.md``),
            so it is the default. Or a method of others: ``"visionzip"``, ``"hiprune"``, ``"tome"`` and the
            rest of ``docs/methods.md``, by name, or as an instance with other settings
            (:mod:`ocvtp.vlm.rivals`), on LLaVA-1.5, LLaVA-NeXT and Qwen2.5-VL.
            They do what was published: nothing is merged or weighed unless ``merge`` and ``weigh`` say so,
            and of a tiled image each tile keeps its share (``layout="official"``). ``"fastv"``,
            ``"sparsevlm"``, ``"sparsevlm2"``, ``"pyramiddrop"`` and ``"dart"`` drop tokens inside the
            language model; ``keep`` is then what goes into its layers on average. ``None``, with
            ``inside``: nothing is dropped before the language model, and nothing of the tower is changed.
        keep: image tokens to keep per image, all its tiles together: a number, or a share of them such as
            ``0.25``, or ``"auto"``: for each image the smallest of ``budgets`` whose coverage error is at
            most ``max_error``, for which a pruner must be given. Where images differ in size, one of fewer
            tokens keeps them all. What the model adds (class token, newlines) comes on top.
        positions: ``"compact"`` numbers the short prompt 0, 1, 2, ... as the official code does;
            ``"original"`` leaves every token the position it has in the long prompt (transformers >= 5.10).
            ``"auto"`` is compact for models with one-dimensional positions, original for those with
            three-dimensional ones (Qwen-VL), which know no other. ``position_ids`` passed by the caller are
            kept as they are; but where ``forward`` gets some that start over within a row, and no mask, they
            say that the row holds several documents, which are pruned and numbered one by one.
        seed: of the pruner's slots, or of ``"random"``.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``, for fused operations.
        precision: of the pruner, see :class:`~ocvtp.pruner.OCPruner`.
        capture: on a GPU, replay the pruner's slot loop as a CUDA graph for shapes that come often: from the
            third call at one among the last 64, of at most 8192 tokens. A few shapes are kept; :func:`remove`
            frees them. While one is captured, some milliseconds, CUDA refuses ``torch.cuda.synchronize()`` in
            other threads. In any case the loop runs beside the layers of the tower that follow it, and scores
            are computed beside the last one. ``"vision"`` replays the whole vision side so, tower and choice
            and projector, whatever their size; of pruners and rules of our own but ``"random"`` and
            ``"grid"``, and not of Qwen-VL. Weights may be written to in place, or replaced; after any other
            change to modules, say of a setting that their code reads, apply again. Calls that want gradients,
            under autocast, in training mode, or with forward hooks on the tower's layers are run as ever, and
            the log says so once.
        refine: rounds that move kept tokens to where they cover more, see :class:`~ocvtp.pruner.OCPruner`;
            after rules that compare features as well, which makes ``"farthest_point"`` k-medoids.
            ``docs/accuracy.md`` on what they do to answers.
            They follow the tower, so each adds to the time to the first token.
        max_error: for ``keep="auto"``.
        budgets: for ``keep="auto"``, ascending numbers of tokens.
        layout: LLaVA-NeXT: ``"layout"`` chooses among the tokens the model would pack (padding is gone) and
            keeps their order; ``"official"`` among all tokens of all tiles, tile by tile, as the published
            code does.
        newlines: which of a packed image's newline tokens stay: its ``"last"`` one, as in the published code;
            those of ``"rows"`` that keep a token (their number depends on the image); ``"all"``.
        frames: of a video, ``"each"`` has the budget of an image, or ``"all"`` together have one, which may
            leave frames empty.
        tower: ``"kept_rows"`` computes the end of the consumed layer for kept tokens only. It saves a few
            per cent of the tower and rounds differently from the unpatched model, even if all are kept.
            Nothing can be merged or weighed then.
        columns: put ``columns`` on every output: ``[B, long]`` int64, for each column of the call's
            ``input_ids`` the column that it has in the short sequence, and so in ``logits`` and
            ``hidden_states``; -1 if it was dropped. :func:`ocvtp.vlm.lengthen` takes a tensor back to the
            caller's columns by it. ``forward`` puts it on calls without pixels too, where nothing moves,
            if they bring ``input_ids`` and no cache that nothing was pruned in. On the output of ``generate``
            with pixels and ``return_dict_in_generate`` it is of the whole prompt, before that is copied for
            beams; new tokens follow without gaps. Tuples (``return_dict=False``) have no place for it.
        merge: what becomes of dropped tokens. ``"projected"``: each is averaged into its nearest kept one, by
            what the language model reads of them; the projector runs on all tokens for that.
            ``"features"``: the same before the projector, by what that reads, which spares its work on
            dropped tokens and is a little worse. ``"off"``: they are thrown away. ``"auto"`` is
            ``"projected"``, unless ``tower`` is ``"kept_rows"``.
        weigh: add log(how many tokens a kept one stands for) to its attention logits in the language model,
            in every layer, so that it counts as many: ToMe's proportional attention (arXiv 2210.09461).
            ``"auto"`` does where the attention implementation can, sdpa, eager and flex_attention; the report
            says why where it can't. What the model adds, a class token or newlines, stands for itself.
        features: of rules that compare features: ``"consumed"``, the layer that the projector reads, which
            ``"auto"`` is but for ``tower="kept_rows"``; ``"early"``, one a third of the way up, as the
            published pruner's; or the 0-based index of an encoder layer. Rules follow the tower in any case.
        fill: what tops a pruner's tokens up to the budget: ``"attention"`` received, as published, or
            ``"farthest_point"``, see :class:`~ocvtp.OCPruner`. ``"auto"`` is the latter for a pruner of the
            consumed layer, which it serves better, and the former for others.
        inside: what drops tokens inside the language model, after whatever is dropped before it: settings of
            :mod:`ocvtp.methods.in_llm`, such as ``FastV(layer=2, keep=166)``. Caches then hold fewer tokens
            in deeper layers, ``forward`` returns fewer logits still, and neither ``columns`` nor ``weigh`` is
            there; nor are labels, chunked prefill, and an image behind a used cache.
        on_invalid: of images in which NaN or Inf is found, in features or scores that a pruner or a rule
            chooses by: ``"raise"`` a ``ValueError``, on a GPU as soon as the host knows without waiting for
            it, at the latest in the next call; or ``"grid"``: they keep tokens spread evenly, and a warning
            is logged once. Other images of the batch keep their tokens either way.

    Returns:
        A :class:`~ocvtp.vlm.PruneReport`; print it.

    Raises:
        UnsupportedModelError: no adapter knows the model or its vision tower.
        PatchError: somebody else patched a method of this instance that pruning would bypass or wrap; the
            message says who, and in which order it goes.
        TypeError, ValueError: a pruner or a setting that does not fit.
    """
    target = unwrap(model)
    adapter = adapter_for(target)
    options = Options(
        pruner=pruner,
        keep=keep,
        positions=positions,
        seed=seed,
        backend=backend,
        precision=precision,
        capture=capture,
        refine=refine,
        max_error=max_error,
        budgets=budgets,
        layout=layout,
        newlines=newlines,
        frames=frames,
        tower=tower,
        columns=columns,
        merge=merge,
        weigh=weigh,
        features=features,
        fill=fill,
        inside=inside,
        on_invalid=on_invalid,
    )
    settings, report = resolve(adapter, options)
    before = _settings_of(target)
    install(target, adapter, settings, _PATCHED)
    if before is not None:
        before.close()
    return report


def remove(model: Any) -> None:
    """Undo :func:`apply`; the model computes the same bits as before. Does nothing to an unpatched model.

    If somebody has wrapped the patched methods since, the wrappers stay and the patch underneath them is
    switched off.

    Raises:
        PatchError: the model is a copy with a wrapper that runs the model it was copied from.
    """
    target = unwrap(model)
    settings = _settings_of(target)
    uninstall(target)
    if settings is not None:
        settings.close()


@contextlib.contextmanager
def pruned(
    model: Any,
    pruner: torch.nn.Module | Rule | Rival | Inside | Reducer | None = DEFAULT_RULE,
    *args: Any,
    **options: Any,
) -> Iterator[PruneReport]:
    """:func:`apply` for the length of a ``with`` block; afterwards the model is as it was before.

    Also an earlier :func:`apply` comes back. The state belongs to the model, not to the thread.

    Args:
        model: as for :func:`apply`.
        pruner: as for :func:`apply`.
        args: ``keep`` and ``positions``, if not given by name.
        options: all others of :func:`apply`.

    Raises:
        Whatever :func:`apply` raises.
    """
    target = unwrap(model)
    adapter = adapter_for(target)
    settings, report = resolve(adapter, Options(pruner, *args, **options))
    before = _settings_of(target)
    install(target, adapter, settings, _PATCHED)
    try:
        yield report
    finally:
        controller = target.__dict__.get(ATTRIBUTE)
        if before is None:
            remove(target)
        elif controller is not None and controller.enabled:  # whatever was put on top meanwhile stays there
            resettle(target, controller, before)
        else:
            install(target, adapter_for(target), before, _PATCHED)
        settings.close()


def select(
    model: Any, pixel_values: torch.Tensor, *, return_attention: bool = False, **vision: Any
) -> Selection:
    """Which tokens a patched model keeps of each image, without running the language model.

    Of a method that merges tokens the selection has a ``reduction``: rows that stand at ``indices``.

    Args:
        model: patched by :func:`apply`.
        pixel_values: from the model's processor.
        return_attention: also return the slot attention map.
        vision: what else the processor made of the images (``image_sizes``, ``image_grid_thw``).

    Raises:
        PatchError: ``model`` is not patched, or not to drop tokens before the language model.
        ValueError: the images have different numbers of tokens; ask for one at a time. Or a method that reads
            the question, which is in no prompt here.
    """
    controller = controller_of(model)
    if not controller.settings.before:
        raise PatchError("nothing is chosen before the language model: ocvtp.apply(model, None, ...)")
    arguments = {"pixel_values": pixel_values, **vision}
    with torch.no_grad():
        found = choose(controller.adapter, arguments, controller.settings, return_attention=return_attention)
    if len(found) > 1:
        raise ValueError("these images have different numbers of tokens: select from one at a time")
    return found[0]


def _settings_of(model: Any) -> Settings | None:
    """The settings under which a model is patched, if it is."""
    controller = model.__dict__.get(ATTRIBUTE)
    return controller.settings if controller is not None and controller.enabled else None
