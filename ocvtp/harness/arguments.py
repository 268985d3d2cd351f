"""What ``--model_args`` can say, and what of it can be told to be wrong without a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch

from ocvtp.methods.in_llm import Inside
from ocvtp.vlm.contracts.reducer import Rival
from ocvtp.vlm.contracts.selector import DEFAULT_RULE, Rule
from ocvtp.vlm.options import Options
from ocvtp_kernels._checks import as_int

#: As ``pruner``: the model as it is.
NONE = "none"
#: Options of :func:`ocvtp.apply` that are handed on under their names.
PASSED = tuple(
    each.name
    for each in dataclasses.fields(Options)
    if each.name not in ("pruner", "keep", "inside", "columns")
)
_COUNTS = ("batch_size", "max_new_tokens", "min_pixels", "max_pixels")


@dataclass(frozen=True)
class Arguments:
    """Arguments of one run.

    Attributes:
        pretrained: folder or Hub id of the model.
        pruner: folder, Hub id or official weights file of an OCPruner; a rule, a rival method, or a method
            inside the language model, as :func:`ocvtp.apply` has them; or ``"none"``: the model as it is.
        keep: as for :func:`ocvtp.apply`.
        layer: encoder layer that official weights were trained on, which they don't say.
        settings: of a rival method that ``pruner`` names, other than its authors' (``{"alpha": 0.2}``).
        text_encoder: CLIP checkpoint that TRIM and CDPruner compare questions with.
        inside: a method inside the language model, behind ``pruner``, with its settings: a JSON object with
            its ``"name"``.
        options: all others of :func:`ocvtp.apply`.
        revision: of the model on the Hub.
        dtype: of its weights; ``"auto"``: as published.
        attn_implementation: as transformers has it.
        device_map: as transformers has it; one process then.
        chat_template: file of a template, or the template, for a processor without one.
        system_prompt: said before every question: ``"vicuna_v1"``, a file, or the words.
        pad_to_square: put pictures on a square of the mean colour, as the published LLaVA did.
        image_grid_pinpoints: of LLaVA-NeXT, such as ``[[672,672]]``: the sizes that pictures are cut to.
        min_pixels: of Qwen's image processors.
        max_pixels: of Qwen's image processors.
        max_new_tokens: where a task says nothing.
        resume: folder of answers, written as they come; a later run goes on from there.
        batch_size: questions answered at once.
        device: of one process.
    """

    pretrained: str
    pruner: str = DEFAULT_RULE
    keep: Any = 64
    layer: int | None = None
    settings: Mapping[str, Any] | None = None
    text_encoder: str | None = None
    inside: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    revision: str = "main"
    dtype: str = "auto"
    attn_implementation: str | None = None
    device_map: str | None = None
    chat_template: str | None = None
    system_prompt: str | None = None
    pad_to_square: bool = False
    image_grid_pinpoints: list[list[int]] | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_new_tokens: int = 1024
    resume: str | None = None
    batch_size: int = 1
    device: str | None = None

    @classmethod
    def from_strings(cls, given: Mapping[str, Any]) -> Arguments:
        """From what lmms-eval made of its command line: numbers and true or false are read, the rest is text.

        Raises:
            TypeError, ValueError: an unknown or missing name, or a value that can't be; the message has the
                name.
        """
        known = {each.name for each in dataclasses.fields(cls)} - {"options"}
        values = {name: _unquoted(value) for name, value in given.items() if value is not None}
        if unknown := sorted(set(values) - known - set(PASSED) - {"max_batch_size"}):
            raise TypeError(
                f"unknown in --model_args: {', '.join(unknown)}; there are "
                f"{', '.join(sorted({*known, *PASSED}))}"
            )
        if "pretrained" not in values:
            raise TypeError("--model_args needs pretrained=, a model's folder or Hub id")
        values.pop("max_batch_size", None)  # lmms-eval always has one, for models that search for a size
        if values.get("pruner") == NONE and "keep" in values:
            raise ValueError(f'keep: pruner="{NONE}" leaves the model as it is: leave keep out')
        options = {name: _parsed(name, values.pop(name)) for name in PASSED if name in values}
        return cls(**{name: _parsed(name, value) for name, value in values.items()}, options=options)

    def __post_init__(self) -> None:
        if not self.pretrained.strip():
            raise ValueError("pretrained is empty; give a model's folder or Hub id")
        if not self.pruner.strip():
            raise ValueError(f'pruner is empty; give a folder, a Hub id, a method, or "{NONE}"')
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (as_int(value) is None or value < 1):
                raise ValueError(f"{name} must be a number, at least 1; got {value!r}")
        if self.layer is not None and as_int(self.layer) is None:
            raise TypeError(f"layer must be the number of an encoder layer; got {self.layer!r}")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(
                f'dtype must be "auto" or one of PyTorch\'s, such as float16; got {self.dtype!r}'
            )
        pairs = self.image_grid_pinpoints
        if pairs is not None and not all(
            isinstance(pair, list) and len(pair) == 2 and all(as_int(side) for side in pair) for pair in pairs
        ):
            raise ValueError(f"image_grid_pinpoints must be pairs of pixels, [[672,672]]; got {pairs!r}")
        if not isinstance(self.pad_to_square, bool):
            raise TypeError(f"pad_to_square must be true or false; got {self.pad_to_square!r}")
        self._check_pruner()
        if not self.unpruned:
            self._try_options()

    @property
    def unpruned(self) -> bool:
        """Whether the model stays as it is."""
        return self.pruner == NONE and self.inside is None

    @property
    def named(self) -> bool:
        """Whether ``pruner`` names a method rather than a trained pruner."""
        return self.pruner in (NONE, *get_args(Rule), *get_args(Rival), *get_args(Inside))

    def _check_pruner(self) -> None:
        """Raise ``ValueError`` for what means nothing to this pruner."""
        if self.layer is not None and self.named:
            raise ValueError(f"layer is for official weights; {self.pruner!r} needs none: leave it out")
        if self.pruner == NONE and self.options:
            said = ", ".join(sorted(self.options))
            raise ValueError(f'{said}: for a pruner, and pruner="{NONE}" leaves the model as it is')
        if self.settings is not None and self.pruner not in get_args(Rival):
            known = ", ".join(get_args(Rival))
            raise ValueError(f"settings is for rival methods ({known}), not for pruner={self.pruner!r}")
        if self.text_encoder is not None and not reads_text(self.pruner):
            raise ValueError(
                f"text_encoder is for trim and cdpruner, which read the question, not for {self.pruner!r}"
            )

    def _try_options(self) -> None:
        """Raise for options that make no sense whatever the model."""
        method = inside_of(self.inside)
        rule = self.pruner if self.named else DEFAULT_RULE
        rest = dict(self.options)
        if not self.named:  # rules refuse what only pruners have
            rest = {**rest, "fill": "auto", "features": "auto"}
        if self.keep == "auto" and not self.named:
            return  # judged with the pruner
        if self.pruner == NONE:
            Options(None, inside=method)
        elif self.pruner not in get_args(Inside):
            chosen: Any = rule
            Options(chosen, keep=self.keep, inside=method, **rest)


def inside_of(given: Mapping[str, Any] | None) -> Any:
    """Settings of :mod:`ocvtp.methods.in_llm` from ``{"name": "fastv", "layer": 2, "keep": 166}``.

    Raises:
        TypeError, ValueError: no such method or setting.
    """
    from ocvtp.methods.in_llm import Dart, FastV, PyramidDrop, SparseVLM

    if given is None:
        return None
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "fastv": (FastV, {}),
        "dart": (Dart, {}),
        "pyramiddrop": (PyramidDrop, {}),
        "sparsevlm": (SparseVLM, {"version": 1}),
        "sparsevlm2": (SparseVLM, {"version": 2}),
    }
    rest = dict(given)
    name = rest.pop("name", None)
    if name not in kinds:
        raise ValueError(f'inside needs a "name", one of {", ".join(kinds)}; got {name!r}')
    kind, own = kinds[name]
    return _made(kind, {**own, **rest}, f"inside {name}")


def reads_text(name: str) -> bool:
    """Whether ``name`` is that of a rival method that compares pictures with questions."""
    from ocvtp.vlm.rivals.catalog import METHODS

    return name in METHODS and METHODS[name].reads_text


def rival_of(name: str, settings: Mapping[str, Any] | None, text: Any) -> Any:
    """A rival method with other settings than its authors', or with the text encoder it needs.

    Raises:
        TypeError, ValueError: no such setting.
    """
    from ocvtp.vlm.rivals.catalog import METHODS

    given = {**(settings or {}), **({} if text is None else {"text": text})}
    return _made(METHODS[name], given, f"pruner {name}")


def _made(kind: Any, settings: Mapping[str, Any], whose: str) -> Any:
    known = {each.name for each in dataclasses.fields(kind) if each.init} - {"adaptation", "behind"}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"{whose} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return kind(**{name: _tuples(value) for name, value in settings.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _unquoted(value: Any) -> Any:
    """lmms-eval's parser leaves quotes on."""
    if isinstance(value, str) and len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value


def _parsed(name: str, value: Any) -> Any:
    """A value of the kind that ``name`` takes, where the parser can't know.

    Raises:
        TypeError, ValueError: it is of another kind.
    """
    if name in ("settings", "inside"):
        if isinstance(value, Mapping):
            return dict(value)
        text = str(value).strip()
        if name == "inside" and not text.startswith("{"):
            return {"name": text}
        found = _json(name, text)
        if not isinstance(found, dict):
            raise ValueError(f'{name} must be a JSON object, such as {{"alpha": 0.2}}; got {value!r}')
        return found
    if name in ("budgets", "image_grid_pinpoints"):
        found = _json(name, value) if isinstance(value, str) else value
        if not isinstance(found, (list, tuple)):
            raise ValueError(f"{name} must be a list in brackets; got {value!r}")
        return list(found)
    if name in _COUNTS and isinstance(value, str) and value.isdecimal():  # lmms-eval's own --batch_size
        return int(value)
    if name in _TEXTS and not isinstance(value, str):
        raise TypeError(f"{name} must be text; got {value!r}: put it in quotes")
    return value


_TEXTS = (
    "pretrained",
    "pruner",
    "text_encoder",
    "revision",
    "dtype",
    "attn_implementation",
    "chat_template",
    "system_prompt",
    "resume",
    "device",
)


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} can't be read as JSON ({error}); got {text!r}") from error
