"""Installing and removing the patch on one model instance."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from ocvtp.selection import Selection
from ocvtp.vlm.call import calls
from ocvtp.vlm.call.controller import ATTRIBUTE, Controller, controller_of, unwrap
from ocvtp.vlm.contracts.adapter import Adapter
from ocvtp.vlm.contracts.errors import PatchError
from ocvtp.vlm.contracts.selector import Rule
from ocvtp.vlm.contracts.settings import Frames, Layout, Newlines, Settings, Tower
from ocvtp.vlm.encode.encode import choose
from ocvtp.vlm.families import adapter_for
from ocvtp.vlm.options import Options, resolve
from ocvtp.vlm.replicas import allow_replicas, refuse_replicas
from ocvtp.vlm.report import PruneReport

_PATCHED = {"forward": calls.forward, "generate": calls.generate}


def apply(
    model: Any,
    pruner: torch.nn.Module | Rule = "farthest_point",
    keep: int | float | Literal["auto"] = 64,
    positions: Literal["compact", "original", "auto"] = "auto",
    *,
    seed: int = 0,
    backend: str = "auto",
    precision: str = "auto",
    capture: bool = True,
    refine: int = 0,
    max_error: float | None = None,
    budgets: Sequence[int] | None = None,
    layout: Layout = "layout",
    newlines: Newlines = "last",
    frames: Frames = "each",
    tower: Tower = "exact",
    columns: bool = False,
) -> PruneReport:
    """Patch a vision-language model in place, so that ``forward`` and ``generate`` prune image tokens.

    Nothing changes for the caller: same inputs from the same processor, and ``generate`` returns the full
    prompt followed by the new tokens. Calls without pixels are untouched. ``forward`` returns the logits of
    the short sequence. Applying again replaces the settings. The patch is on this instance alone; it
    survives ``copy.deepcopy`` and leaves no trace in ``state_dict`` and ``save_pretrained``. Image features
    that the caller computes with ``get_image_features`` are not pruned, and forward hooks on the vision
    tower as a whole don't fire (those on its layers do).

    Args:
        model: a ``...ForConditionalGeneration`` of a family in ``docs/models.md``, or a PEFT or
            ``torch.compile`` wrapper around one.
        pruner: an :class:`~ocvtp.OCPruner` for the tower's width and token unit, moved to the tower's device
            on use; or a rule without training: ``"attention"``, ``"random"``, ``"grid"``, or
            ``"farthest_point"``, which compares features a third of the way up the tower. The latter answered
            best of all at 11 % of the tokens where we could measure it (``docs/accuracy.md``), so it is the
            default.
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
        capture: where kernels compute, replay the pruner's slot loop as a CUDA graph from the second call at
            a shape on. A few shapes are kept; :func:`remove` frees them. On a GPU the loop runs beside the
            tower's remaining layers in either case.
        refine: rounds that move kept tokens to where they cover more, see :class:`~ocvtp.pruner.OCPruner`;
            after ``"farthest_point"`` as well, which makes it k-medoids. ``docs/accuracy.md`` on what they do
            to answers.
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
        columns: put ``columns`` on every output: ``[B, long]`` int64, for each column of the call's
            ``input_ids`` the column that it has in the short sequence, and so in ``logits`` and
            ``hidden_states``; -1 if it was dropped. :func:`ocvtp.vlm.lengthen` takes a tensor back to the
            caller's columns by it. ``forward`` puts it on calls without pixels too, where nothing moves,
            unless they go on with a cache that nothing was pruned in. On the output of ``generate`` with
            ``return_dict_in_generate`` it is of the whole prompt, before that is copied for beams; new tokens
            follow without gaps. Tuples (``return_dict=False``) and plain tensors have no place for it.

    Returns:
        A :class:`~ocvtp.vlm.PruneReport`; print it.

    Raises:
        UnsupportedModelError: no adapter knows the model or its vision tower.
        PatchError: somebody else patched a method of this instance that pruning would bypass or wrap.
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
    )
    settings, report = resolve(adapter, options)
    before = _settings_of(target)
    _install(target, adapter, settings)
    if before is not None:
        before.selector.close()
    return report


def remove(model: Any) -> None:
    """Undo :func:`apply`; the model computes the same bits as before. Does nothing to an unpatched model.

    If accelerate or ``torch.compile`` has wrapped the patched methods since, their wrappers stay and the
    patch underneath them is switched off.
    """
    target = unwrap(model)
    controller = target.__dict__.get(ATTRIBUTE)
    if controller is None:
        return
    controller.enabled = False
    controller.settings.selector.close()
    current = {name: target.__dict__.get(name) for name in _PATCHED}
    if any(_may_call_ours(target, name) for name in _PATCHED):
        return
    for name, method in current.items():
        if not _is_ours(method):  # someone restored it over our heads
            continue
        if controller.previous[name] is None:
            del target.__dict__[name]
        else:
            target.__dict__[name] = controller.previous[name]
    del target.__dict__[ATTRIBUTE]
    allow_replicas(target)


@contextlib.contextmanager
def pruned(
    model: Any, pruner: torch.nn.Module | Rule = "farthest_point", *args: Any, **options: Any
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
    _install(target, adapter, settings)
    try:
        yield report
    finally:
        if before is None:
            remove(target)
        else:
            _install(target, adapter_for(target), before)
        settings.selector.close()


def select(
    model: Any, pixel_values: torch.Tensor, *, return_attention: bool = False, **vision: Any
) -> Selection:
    """Which tokens a patched model keeps of each image, without running the language model.

    Args:
        model: patched by :func:`apply`.
        pixel_values: from the model's processor.
        return_attention: also return the slot attention map.
        vision: what else the processor made of the images (``image_sizes``, ``image_grid_thw``).

    Raises:
        PatchError: ``model`` is not patched.
        ValueError: the images have different numbers of tokens; ask for one at a time.
    """
    controller = controller_of(model)
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


def _install(model: Any, adapter: Adapter, settings: Settings) -> None:
    _refuse_foreign_patches(model, adapter)
    controller = model.__dict__.get(ATTRIBUTE)
    if controller is not None and all(_reaches_ours(model.__dict__.get(name)) for name in _PATCHED):
        controller.adapter, controller.settings, controller.enabled = adapter, settings, True
        return
    if controller is not None:  # one of the two methods was replaced by its unpatched self
        remove(model)
    installed: dict[str, Any] = {ATTRIBUTE: Controller(model, adapter, settings, _PATCHED)}
    for name in _PATCHED:
        installed[name] = types.MethodType(_wrapper(type(model), name), model)
    model.__dict__.update(installed)  # all or nothing
    refuse_replicas(model)


def _wrapper(cls: type, name: str) -> Any:
    """A function for the class's method ``name`` that asks the instance it is bound to, so copies rebind."""
    run = _PATCHED[name]

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        controller = self.__dict__.get(ATTRIBUTE)
        if controller is None:  # somebody kept the method from before remove
            return getattr(self, name)(*args, **kwargs)
        return run(controller, args, kwargs)

    # generate inspects the signature of forward. The class's function has it whatever sits on the instance.
    functools.update_wrapper(patched, getattr(cls, name))
    patched.__dict__[ATTRIBUTE] = name
    return patched


def _is_ours(method: Any) -> bool:
    return ATTRIBUTE in getattr(getattr(method, "__func__", None), "__dict__", {})


def _reaches_ours(method: Any) -> bool:
    """Whether a method is ours or a known wrapper around ours."""
    while method is not None:
        if _is_ours(method):
            return True
        method = _inside(method)
    return False


def _may_call_ours(model: Any, name: str) -> bool:
    """Whether somebody else's method on the instance calls ours, or may."""
    method = model.__dict__.get(name)
    if method is None or _is_ours(method):
        return False
    return _reaches_ours(method) or not _is_known(model, name)


def _inside(method: Any) -> Any:
    """What an accelerate or ``torch.compile`` wrapper wraps, else ``None``."""
    compiled = getattr(method, "_torchdynamo_orig_callable", None)
    if compiled is not None:
        return compiled
    return getattr(method, "__wrapped__", None) if _is_accelerates(method) else None


def _is_accelerates(method: Any) -> bool:
    function = getattr(method, "func", method)  # accelerate binds the module with functools.partial
    return str(getattr(function, "__module__", "")).startswith("accelerate.")


def _is_known(module: torch.nn.Module, name: str) -> bool:
    """Whether an instance's method is the class's own, ours, accelerate's or ``torch.compile``'s."""
    method = module.__dict__.get(name)
    if method is None or _is_ours(method) or _is_accelerates(method):
        return True
    if getattr(method, "_torchdynamo_orig_callable", None) is not None:
        return True
    # accelerate puts the bound original on the instance when its hooks are removed
    return getattr(method, "__func__", None) is getattr(type(module), name)


def _refuse_foreign_patches(model: Any, adapter: Adapter) -> None:
    suspects = [(name, model, name) for name in _PATCHED]
    for path, module, name in [*suspects, *adapter.bypassed_methods()]:
        if _is_known(module, name):
            continue
        method = module.__dict__[name]
        origin = getattr(method, "__module__", None) or type(method).__module__
        label = getattr(method, "__qualname__", None) or repr(method)
        raise PatchError(
            f"{path} of this {type(model).__name__} was replaced by {origin}.{label}; pruning would go "
            "around or under it. Remove that patch first, or apply it after ocvtp"
        )
