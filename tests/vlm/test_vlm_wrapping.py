"""Every short sequence of what others do to the patched methods: nothing recurses or is half pruned.

The model is a stand-in that tells who ran and how, and the methods put on it tell what was kept. So the
installing, finding and removing is the real one, and thousands of sequences take seconds. Each runs a second
time without ours on a model that says what is then to be expected.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ocvtp
from ocvtp.vlm import patch
from ocvtp.vlm.call import inner
from ocvtp.vlm.call.shorten import ShortCall
from tests.vlm.tiny_llava import KEEP, ONE, TOKENS, pixels, prompt

IDS = torch.zeros(1, 3, dtype=torch.long)


class Inner(torch.nn.Module):
    def forward(
        self, input_ids: Any = None, pixel_values: Any = None, mm_encoder_outputs: Any = None, **_: Any
    ) -> Any:
        return types.SimpleNamespace(
            kept="everything" if pixel_values is not None else mm_encoder_outputs["kept"],
            past_key_values=None,
        )


class Model(torch.nn.Module):
    """Tells of every call which instance ran it, under autocast or not, and what was kept."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Inner()
        self.config = types.SimpleNamespace(return_dict=True)
        self.config.get_text_config = lambda: types.SimpleNamespace(pad_token_id=0)
        self.me = [0]

    def get_decoder(self) -> Any:
        return self.model

    def forward(self, input_ids: Any, pixel_values: Any = None, mm_encoder_outputs: Any = None) -> Any:
        out = self.model(
            input_ids=input_ids, pixel_values=pixel_values, mm_encoder_outputs=mm_encoder_outputs
        )
        return {"kept": out.kept, "me": id(self.me), "autocast": torch.is_autocast_enabled("cpu")}

    def generate(self, input_ids: Any, pixel_values: Any = None, mm_encoder_outputs: Any = None) -> Any:
        return self(input_ids, pixel_values, mm_encoder_outputs=mm_encoder_outputs)


class Family:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.pixel_keys = {"image": "pixel_values"}

    def bypassed_methods(self) -> list[Any]:
        return []


class Settings:
    route = "mm_encoder_outputs"
    weigh = False
    before, inside = True, None

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.selector = types.SimpleNamespace(close=lambda: None)

    def close(self) -> None:
        self.selector.close()


def run(controller: Any, original: Any, args: Any, kwargs: Any) -> Any:
    """``forward`` and ``generate``: pixels become what is kept of them."""
    given = {**dict(zip(("input_ids", "pixel_values"), args, strict=False)), **kwargs}
    if given.get("pixel_values") is None:
        return original(**given)
    del given["pixel_values"]
    return original(**given, mm_encoder_outputs={"kept": controller.settings.keep})


def shorten(adapter: Any, settings: Any, ids: Any, arguments: Any, *_: Any, **__: Any) -> ShortCall:
    kept = {"kept": settings.keep}
    return ShortCall(ids, {**arguments, "pixel_values": None, "mm_encoder_outputs": kept}, None, IDS)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(patch, "adapter_for", Family)
    monkeypatch.setattr(patch, "resolve", lambda adapter, options: (Settings(options.keep), options.keep))
    monkeypatch.setattr(patch, "_PATCHED", {"forward": run, "generate": run})
    monkeypatch.setattr(inner, "shorten", shorten)
    torch.compiler.set_stance("force_eager")  # the wrapper is torch's, what it wraps runs as it is
    yield
    torch.compiler.set_stance("default")


class World:
    """One model and what was done to it; ``ours`` is ``False`` for the one that says what to expect."""

    def __init__(self, ours: bool) -> None:
        self.model: Any = Model()
        self.ours = ours
        self.keep: int | None = None  # what is to be kept now
        self.blocks: list[tuple[Any, int | None, Any]] = []
        self.copied = False

    def apply(self, keep: int = 5) -> None:
        if self.ours:
            ocvtp.apply(self.model, "random", keep=keep)
        self.keep = keep

    def again(self) -> None:
        self.apply(7)

    def remove(self) -> None:
        if self.ours:
            ocvtp.remove(self.model)
        self.keep = None

    def enter(self) -> None:
        block = ocvtp.pruned(self.model, "random", keep=9) if self.ours else contextlib.nullcontext()
        block.__enter__()
        self.blocks.append((block, self.keep, self.model))
        self.keep = 9

    def leave(self) -> None:
        if self.blocks:
            block, before, model = self.blocks.pop()
            block.__exit__(None, None, None)
            if model is self.model:  # the copy of one goes on as it was
                self.keep = before

    def mixed(self) -> None:
        _accelerator().prepare_model(self.model)

    def unmixed(self) -> None:
        _accelerator().unwrap_model(self.model, keep_fp32_wrapper=False)

    def unwrapped(self) -> None:
        _accelerator().unwrap_model(self.model)

    def hook(self) -> None:
        from accelerate.hooks import ModelHook, add_hook_to_module

        add_hook_to_module(self.model, ModelHook())

    def unhook(self) -> None:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(self.model)

    def wraps(self) -> None:
        self._wrap("forward")

    def wraps_generate(self) -> None:
        self._wrap("generate")

    def _wrap(self, name: str) -> None:
        method = getattr(self.model, name)

        @functools.wraps(method)
        def theirs(*args: Any, **kwargs: Any) -> Any:
            return {**method(*args, **kwargs), "wrapped": True}

        setattr(self.model, name, theirs)

    def compile(self) -> None:
        self.model.forward = torch.compile(self.model.forward)

    def compile_module(self) -> None:
        self.model.compile()

    def copy(self) -> None:
        self.model = copy.deepcopy(self.model)

    def told(self, name: str) -> Any:
        """What a call tells, but for whose model it was: 0 for the one that was called."""
        made = getattr(self.model, "__call__" if name == "forward" else name)(IDS, pixel_values=IDS)
        return {**made, "me": made["me"] - id(self.model.me) and 1}


@functools.cache
def _accelerator() -> Any:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(mixed_precision="bf16", cpu=True)


@pytest.fixture(scope="module", autouse=True)
def no_precision_for_others() -> Iterator[None]:
    """accelerate's state is the process's: an Accelerator of a later test would be in half precision."""
    yield
    if _accelerator.cache_info().currsize:
        _accelerator().state._reset_state(reset_partial_state=True)
        _accelerator.cache_clear()


OURS = ("apply", "again", "remove", "enter", "leave")
THEIRS = (
    *("mixed", "unmixed", "unwrapped", "hook", "unhook", "wraps", "wraps_generate", "compile"),
    *("compile_module", "copy"),
)


def fault_of(steps: tuple[str, ...]) -> str | None:
    """What is wrong after the last of ``steps``; those before it are looked at as sequences of their own."""
    world, bare = World(ours=True), World(ours=False)
    for step in steps:
        try:
            getattr(bare, step)()
        except Exception:
            return None  # they refuse it without us as well
        try:
            getattr(world, step)()
        except ocvtp.PatchError as error:
            if not any(word in str(error) for word in ("Take it off", "del model.")):
                return f"{step} is refused without advice: {error}"
            return None
        except Exception as error:
            return f"{step}: {error!r}"
    kept = set()
    for name in ("forward", "generate"):
        try:
            want = bare.told(name)
        except Exception:
            return None  # broken without us: accelerate binds a wrapper twice
        if want["me"]:
            return None  # likewise: a compiled or wrapped method of a copy runs the model it was made for
        try:
            got = world.told(name)
        except (Exception, RecursionError) as error:
            return f"{name}: {type(error).__name__} {error}"
        kept.add(got["kept"])
        if {**got, "kept": None} != {**want, "kept": None}:
            return f"{name}: {got} instead of {want}"
    expected = "everything" if world.keep is None else world.keep
    return None if kept == {expected} else f"keeps {kept} instead of {expected}"


# The rest differs little from one of these.
FEW = ("apply", "remove", "enter", "leave", "mixed", "unmixed", "wraps", "compile", "copy")
ALL = (*OURS, *THEIRS)


@pytest.mark.parametrize(
    ("steps", "length"),
    [
        pytest.param(ALL, 1, id="all 1"),
        pytest.param(ALL, 2, id="all 2"),
        pytest.param(FEW, 3, id="few 3"),
        pytest.param(ALL, 3, id="all 3", marks=pytest.mark.slow),
        pytest.param(FEW, 4, id="few 4", marks=[pytest.mark.slow, pytest.mark.thorough]),
    ],
)
def test_sequences(steps: tuple[str, ...], length: int, stand_in: None) -> None:
    faults = {}
    for sequence in itertools.product(steps, repeat=length):
        if any(step in OURS for step in sequence):
            fault = fault_of(sequence)
            if fault is not None:
                faults[" ".join(sequence)] = fault
    assert not faults, "\n".join(f"{steps}: {fault}" for steps, fault in list(faults.items())[:20])


# ------------------------------------------------------------------------------------ on a model that is real


def kept(model: Any) -> list[int]:
    """Tokens that the language model sees in ``forward`` and in ``generate``."""
    seen: list[int] = []
    decoder = model.model.language_model
    handle = decoder.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    inputs = prompt(ONE, pixels(1))
    with torch.no_grad():
        model(**inputs)
        model.generate(**inputs, do_sample=False, max_new_tokens=1)
    handle.remove()
    return seen


SHORT, LONG = [len(ONE) - TOKENS + KEEP] * 2, [len(ONE)] * 2


def test_mixed_precision_then_remove_and_again(model: Any, oc_pruner: Any) -> None:
    bare = copy.deepcopy(model)
    accelerator = _accelerator()
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    accelerator.prepare_model(model)
    assert kept(model) == SHORT
    ocvtp.remove(model)
    assert kept(model) == LONG
    accelerator.prepare_model(bare)
    inputs = prompt(ONE, pixels(1))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, bare(**inputs).logits)
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    assert kept(model) == SHORT
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert kept(model) == SHORT
    ocvtp.remove(model)
    assert kept(model) == LONG
    assert "_ocvtp" not in model.__dict__


def test_mixed_precision_inside_a_block(model: Any, oc_pruner: Any) -> None:
    with ocvtp.pruned(model, oc_pruner, keep=KEEP):
        _accelerator().prepare_model(model)
        assert kept(model) == SHORT
    assert kept(model) == LONG


@pytest.mark.parametrize("first", ["apply", "prepare"])
def test_mixed_precision_taken_off(first: str, model: Any, oc_pruner: Any) -> None:
    accelerator = _accelerator()
    if first == "prepare":
        accelerator.prepare_model(model)
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    if first == "apply":
        accelerator.prepare_model(model)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert kept(model) == SHORT
    ocvtp.remove(model)
    assert kept(model) == LONG
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    assert kept(model) == SHORT


def test_wrappers_know_the_signature(model: Any, oc_pruner: Any) -> None:
    """``Trainer`` and ``generate`` read it, of ours and through what lies on it."""
    import inspect

    want = inspect.signature(model.forward)
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    assert inspect.signature(model.forward) == want
    method = model.forward
    model.forward = functools.wraps(method)(lambda *args, **kwargs: method(*args, **kwargs))
    assert inspect.signature(model.forward) == want
    _accelerator().prepare_model(model)
    assert inspect.signature(model.forward) == want


def test_a_wrapper_that_says_what_it_wraps_stays_on_top(model: Any, oc_pruner: Any) -> None:
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    method = model.forward

    @functools.wraps(method)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    model.forward = theirs
    ocvtp.apply(model, oc_pruner, keep=KEEP + 2)
    assert model.__dict__["forward"] is theirs
    assert kept(model) == [length + 2 for length in SHORT]
    ocvtp.remove(model)
    assert kept(model) == LONG
    del model.forward
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    assert kept(model) == SHORT
    assert method(**prompt(ONE, pixels(1))).logits.shape[1] == SHORT[0]  # kept from the first time
    ocvtp.remove(model)
    assert method(**prompt(ONE, pixels(1))).logits.shape[1] == LONG[0]
    model.forward = method
    assert kept(model) == LONG
    ocvtp.apply(model, oc_pruner, keep=KEEP)
    assert kept(model) == SHORT


def test_a_refusal_names_the_code_that_is_there(model: Any, oc_pruner: Any) -> None:
    """``functools.wraps`` gives a wrapper the module and name of what it wraps."""
    method = model.forward
    model.forward = functools.wraps(method)(lambda *args, **kwargs: method(*args, **kwargs))
    with pytest.raises(ocvtp.PatchError, match=r"was replaced by .*test_vlm_wrapping\..*Take it off"):
        ocvtp.apply(model, oc_pruner, keep=KEEP)
