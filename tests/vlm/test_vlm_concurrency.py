"""Threads, processes, exceptions and interrupts: nothing leaks, and the next call is right."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import multiprocessing
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache, LogitsProcessorList

import ocvtp
from ocvtp import OCPruner
from ocvtp.vlm import methods, patch
from ocvtp.vlm.call import calls
from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.call.weighing import attentions_of, hold_weights
from ocvtp.vlm.towers.clip import root
from tests.vlm import tiny_llava, tiny_qwen
from tests.vlm.skips import NATIVE_ROUTE, VERSION, needs_images_behind_cache
from tests.vlm.tiny_llava import GREEDY, KEEP, NONE, ONE, TWO, llava, pixels, prompt

NEW = GREEDY["max_new_tokens"]
FOLLOW_UP = [40, 41, 42]
Inputs = dict[str, Any]
Work = Callable[[], Any]


def qwen_inputs(*sizes: tuple[int, int], seed: int = 1) -> Inputs:
    grids = tiny_qwen.grid(*((1, *size) for size in sizes))
    ids = [1, 5]
    for units in tiny_qwen.units(grids):
        ids += [tiny_qwen.VISION_START, *[tiny_qwen.IMAGE] * units, tiny_qwen.VISION_END, 7]
    made = prompt([*ids, 8, 9])
    types = (made["input_ids"] == tiny_qwen.IMAGE).int()
    return {
        **made,
        "pixel_values": tiny_qwen.pixels(grids, seed),
        "image_grid_thw": grids,
        "mm_token_type_ids": types,
    }


class Fault(Exception):
    pass


class Kind:
    """A model, a pruner for it and prompts, and what is raised in its calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.error: type[BaseException] = KeyboardInterrupt if name == "llava" else Fault

    def model(self) -> Any:
        return copy.deepcopy(_built(self.name))

    def pruner(self, seed: int = 3) -> OCPruner:
        made = tiny_llava.pruner(seed=seed)
        if self.name != "llava":
            state = made.state_dict()
            made = OCPruner(dataclasses.replace(made.config, unit=2)).eval()
            made.load_state_dict(state)
        return made

    def told(self, which: int, keep: int | None = KEEP, seed: int = 3) -> Any:
        """:func:`expected` of this kind."""
        return expected(self.name, which, keep, seed)

    def prompts(self) -> list[Inputs]:
        """One image, two other images, text."""
        if self.name == "llava":
            images = pixels(3)
            return [prompt(ONE, images[:1]), prompt(TWO, images[1:]), prompt(NONE)]
        return [qwen_inputs((8, 12)), qwen_inputs((6, 6), (4, 10), seed=2), prompt(NONE)]

    def layers(self, model: Any) -> Any:
        return (
            root(model.model.vision_tower).encoder.layers
            if self.name == "llava"
            else model.model.visual.blocks
        )

    def projector(self, model: Any) -> torch.nn.Module:
        return model.model.multi_modal_projector if self.name == "llava" else model.model.visual.merger.mlp


@cache
def _built(name: str) -> Any:
    return llava() if name == "llava" else tiny_qwen.FAMILIES[name]()


@cache
def expected(name: str, which: int, keep: int | None = KEEP, seed: int = 3) -> Any:
    """What is told of a prompt by a model that nobody else has touched."""
    kind, model = Kind(name), Kind(name).model()
    if keep is not None:
        ocvtp.apply(model, kind.pruner(seed), keep=keep)
    return told(model, kind.prompts()[which])


@pytest.fixture(params=["llava", "qwen2_5_vl"])
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param != "llava" and Version("5.10") > VERSION:
        pytest.skip("Qwen-VL is served on transformers >= 5.10")
    return Kind(request.param)


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*work: Work, timeout: float = 120) -> list[Any]:
    """Results of ``work``, each done in a thread of its own; raises what any of them raises."""
    results: list[Any] = [None] * len(work)
    errors: list[BaseException] = []
    start = threading.Barrier(len(work))

    def do(i: int) -> None:
        try:
            start.wait()
            results[i] = work[i]()
        except BaseException as error:  # for the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=do, args=(i,), daemon=True) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results


def told(model: Any, inputs: Inputs, **more: Any) -> Any:
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True, **more)
    return out.sequences, torch.stack(out.logits)


@torch.no_grad()
def logits(model: Any, inputs: Inputs) -> torch.Tensor:
    return model(**inputs).logits


def identical(got: Any, want: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def again(count: int, work: Work) -> Work:
    return lambda: [work() for _ in range(count)]


#: What a call may leave behind on a module: Qwen-VL's own record of the last prompt's positions.
UPSTREAMS = {"rope_deltas"}


def state(model: Any) -> dict[str, Any]:
    """Everything on the model and its modules that a call could change."""
    found: dict[str, Any] = {
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
    }
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key in UPSTREAMS:
                continue
            shallow = tuple(map(id, value.values())) if isinstance(value, dict) else id(value)
            found[f"{name}.{key}"] = (id(value), shallow)
    controller = model.__dict__.get("_ocvtp")
    if controller is not None:
        found["controller"] = {key: id(value) for key, value in controller.__dict__.items()}
    return found


# ----------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("pair", [(0, 1), (0, 2), (1, 1)])
def test_two_threads_on_one_model(kind: Kind, pair: tuple[int, int], switching: None) -> None:
    model = kind.model()
    ocvtp.apply(model, kind.pruner(), keep=KEEP)
    jobs = [kind.prompts()[i] for i in pair]
    want = [told(model, job) for job in jobs]
    before = state(model)
    got = at_once(*(again(3, lambda job=job: told(model, job)) for job in jobs))  # type: ignore[misc]
    for results, one in zip(got, want, strict=True):
        assert all(identical(result, one) for result in results)
    assert state(model) == before


def test_generate_beside_forward_and_select(kind: Kind, switching: None) -> None:
    model, inputs = kind.model(), kind.prompts()
    ocvtp.apply(model, kind.pruner(), keep=KEEP)
    vision = {k: v for k, v in inputs[0].items() if k in ("pixel_values", "image_grid_thw")}
    want = told(model, inputs[1]), logits(model, inputs[0]), ocvtp.vlm.select(model, **vision).indices
    got = at_once(
        again(3, lambda: told(model, inputs[1])),
        again(6, lambda: logits(model, inputs[0])),
        again(6, lambda: ocvtp.vlm.select(model, **vision).indices),
    )
    assert all(identical(result, want[0]) for result in got[0])
    assert all(torch.equal(result, want[1]) for result in got[1])
    assert all(torch.equal(result, want[2]) for result in got[2])


def test_conversations_in_two_threads(kind: Kind, switching: None) -> None:
    model = kind.model()
    ocvtp.apply(model, kind.pruner(), keep=KEEP)

    def conversation(first: Inputs) -> list[torch.Tensor]:
        kv = DynamicCache()
        sequences, _ = told(model, first, past_key_values=kv)
        ids = torch.cat([sequences, torch.tensor([FOLLOW_UP])], dim=1)
        return [sequences, *told(model, {"input_ids": ids}, past_key_values=kv)]

    jobs = kind.prompts()[:2]
    want = [conversation(job) for job in jobs]
    got = at_once(*(again(3, lambda job=job: conversation(job)) for job in jobs))  # type: ignore[misc]
    for results, one in zip(got, want, strict=True):
        assert all(identical(result, one) for result in results)


def test_two_models_with_pruners_of_their_own(switching: None) -> None:
    """Two of a family and one of another, one after another and at once."""
    kinds = [Kind("llava"), Kind("llava"), *([Kind("qwen2_5_vl")] if Version("5.10") <= VERSION else [])]
    models = [kind.model() for kind in kinds]
    inputs = [kind.prompts()[1] for kind in kinds]
    for i, (kind, model) in enumerate(zip(kinds, models, strict=True)):
        ocvtp.apply(model, kind.pruner(seed=3 + i), keep=KEEP + i)
    want = [told(model, job) for model, job in zip(models, inputs, strict=True)]
    assert not torch.equal(want[0][1], want[1][1])
    jobs = zip(models, inputs, strict=True)
    got = at_once(*(again(3, lambda model=m, job=j: told(model, job)) for m, j in jobs))  # type: ignore[misc]
    for results, one in zip(got, want, strict=True):
        assert all(identical(result, one) for result in results)
    ocvtp.remove(models[0])
    assert logits(models[0], inputs[0]).shape[1] == inputs[0]["input_ids"].shape[1]
    assert identical(told(models[1], inputs[1]), want[1])


def test_one_pruner_for_two_models(switching: None) -> None:
    pruner, kind = Kind("llava").pruner(), Kind("llava")
    models, inputs = [kind.model(), kind.model()], kind.prompts()
    for model in models:
        ocvtp.apply(model, pruner, keep=KEEP)
    want = [told(model, inputs[i]) for i, model in enumerate(models)]
    got = at_once(again(3, lambda: told(models[0], inputs[0])), again(3, lambda: told(models[1], inputs[1])))
    for results, one in zip(got, want, strict=True):
        assert all(identical(result, one) for result in results)
    ocvtp.remove(models[0])
    assert identical(told(models[1], inputs[1]), want[1])


class At:
    """A place of a call at which something happens: a module's forward, or a callback of ``generate``."""

    def __init__(self, model: Any, kind: Kind, place: str, do: Callable[[], None]) -> None:
        self._do, self._count = do, 0
        self._wait = {"decode": 3, "processor": 2, "streamer": 3, "criterion": 2}.get(place, 1)
        self.more: dict[str, Any] = {}
        self._undo: Callable[[], None] = lambda: None
        decoder = model.model.language_model.layers[1]
        modules = {
            "first tower layer": kind.layers(model)[0],
            "layer after the pruner's": kind.layers(model)[4],
            "projector": kind.projector(model),
            "embeddings": model.get_input_embeddings(),
            "prefill": decoder,
            "decode": decoder,
        }
        if place in modules:
            self._undo = modules[place].register_forward_hook(lambda *_: self._happen()).remove
        elif place == "pruner":
            pruner = controller_of(model).settings.selector.pruner
            prepare = pruner.prepare

            def watched(*args: Any, **kwargs: Any) -> Any:
                self._happen()
                return prepare(*args, **kwargs)

            pruner.__dict__["prepare"] = watched
            self._undo = lambda: pruner.__dict__.__delitem__("prepare")
        elif place == "processor":
            self.more = {"logits_processor": LogitsProcessorList([self._processor])}
        elif place == "criterion":
            self.more = {"stopping_criteria": [self._criterion]}
        elif place == "streamer":
            self.more = {"streamer": self}

    def __enter__(self) -> dict[str, Any]:
        return self.more

    def __exit__(self, *_: object) -> None:
        self._undo()
        assert self._count >= self._wait  # the place was reached

    def _happen(self) -> None:
        self._count += 1
        if self._count == self._wait:
            self._do()

    def _processor(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._happen()
        return scores

    def _criterion(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._happen()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def put(self, value: torch.Tensor) -> None:
        self._happen()

    def end(self) -> None:
        pass


VISION_PLACES = ["first tower layer", "pruner", "layer after the pruner's", "projector"]
LANGUAGE_PLACES = ["embeddings", "prefill", "decode", "processor", "criterion", "streamer"]
PLACES = VISION_PLACES + LANGUAGE_PLACES


@pytest.mark.parametrize("what", ["other settings", "another pruner", "remove", "remove and apply"])
@pytest.mark.parametrize("place", PLACES)
def test_a_running_call_finishes_on_the_settings_it_started_with(kind: Kind, place: str, what: str) -> None:
    model, inputs, pruner = kind.model(), kind.prompts()[0], kind.pruner()
    others = kind.told(0, KEEP + 2, seed=4 if what == "another pruner" else 3)
    assert not torch.equal(kind.told(0)[1], others[1])
    ocvtp.apply(model, pruner, keep=KEEP)

    def change() -> None:
        if what.startswith("remove"):
            ocvtp.remove(model)
        if what != "remove":
            other = kind.pruner(seed=4) if what == "another pruner" else pruner
            ocvtp.apply(model, other, keep=KEEP + 2)

    with At(model, kind, place, lambda: at_once(change) and None) as more:
        got = told(model, inputs, **more)
    assert identical(got, kind.told(0))
    assert identical(told(model, inputs), kind.told(0, None) if what == "remove" else others)
    assert ("_ocvtp" in model.__dict__) == (what != "remove")


@pytest.mark.parametrize("place", ["first tower layer", "projector", "prefill", "decode", "processor"])
def test_an_unpruned_call_stays_unpruned(kind: Kind, place: str) -> None:
    model, inputs = kind.model(), kind.prompts()[0]

    def change() -> None:
        ocvtp.apply(model, kind.pruner(), keep=KEEP)

    with At(model, kind, place, lambda: at_once(change) and None) as more:
        assert identical(told(model, inputs, **more), kind.told(0, None))
    assert identical(told(model, inputs), kind.told(0))


def test_weights_reach_a_call_under_which_the_patch_goes_and_comes_back(kind: Kind) -> None:
    """Off when generate calls forward, on again before the first attention: nobody else brings them then."""
    model, inputs, pruner = kind.model(), kind.prompts()[0], kind.pruner()
    ocvtp.apply(model, pruner, keep=KEEP)
    order: list[str] = []

    def off(*_: Any) -> None:
        order.append("off")
        ocvtp.remove(model)

    def on(*_: Any) -> None:
        if order == ["off"]:
            order.append("on")
            ocvtp.apply(model, pruner, keep=KEEP + 2)

    hooks = [
        kind.projector(model).register_forward_pre_hook(off),
        model.get_decoder().layers[0].register_forward_pre_hook(on),
    ]
    got = told(model, inputs)
    for hook in hooks:
        hook.remove()
    assert order == ["off", "on"]
    assert identical(got, kind.told(0))


def test_weights_reach_a_call_that_begins_while_the_patch_goes(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The patch, and its hooks, go after the call has found its controller and before it holds on to them."""
    model, inputs = kind.model(), kind.prompts()[0]
    ocvtp.apply(model, kind.pruner(), keep=KEEP)

    def late(controller: Any) -> Any:
        ocvtp.remove(model)
        return hold_weights(controller)

    monkeypatch.setattr(calls, "hold_weights", late)
    assert identical(told(model, inputs), kind.told(0))
    gc.collect()
    assert not any(module._forward_pre_hooks for module in attentions_of(model))


def test_a_hook_that_is_half_on_lets_calls_pass(kind: Kind) -> None:
    """PyTorch puts a hook on first and says then that it takes keyword arguments; another thread may run
    in between, with the patch not on yet."""
    model, text = kind.model(), kind.prompts()[2]
    want = told(model, text)
    ocvtp.apply(model, kind.pruner(), keep=KEEP)
    half = 0
    for module in model.modules():
        half += len(module._forward_pre_hooks_with_kwargs)
        module._forward_pre_hooks_with_kwargs.clear()
    assert half > 1
    assert identical(told(model, text), want)


def test_switching_on_and_off_beside_a_generating_thread(switching: None) -> None:
    """Whenever it happens, a call is one of those that there can be."""
    kind = Kind("llava")
    model, inputs, pruner = kind.model(), kind.prompts()[0], kind.pruner()
    possible = [kind.told(0, keep) for keep in (None, KEEP, KEEP + 2)]
    done = threading.Event()

    def calls() -> list[Any]:
        try:
            return [told(model, inputs) for _ in range(12)]
        finally:
            done.set()

    def switch() -> None:
        while not done.is_set():
            for keep in (KEEP, KEEP + 2):
                ocvtp.apply(model, pruner, keep=keep)
            # transformers < 5.18 encodes images in forward, where an unpatched generate may have got it from.
            if NATIVE_ROUTE == "mm_encoder_outputs":
                ocvtp.remove(model)

    ocvtp.apply(model, pruner, keep=KEEP)
    got, _ = at_once(calls, switch)
    assert all(any(identical(one, other) for other in possible) for one in got)
    ocvtp.remove(model)
    assert "_ocvtp" not in model.__dict__
    assert identical(told(model, inputs), possible[0])


def test_a_method_kept_from_before_remove(kind: Kind) -> None:
    """A thread may hold the method, and a server its bound ``generate``, when another removes the patch."""
    model, inputs = kind.model(), kind.prompts()[0]
    want = told(model, inputs), logits(model, inputs)
    ocvtp.apply(model, kind.pruner(), keep=KEEP)
    generate, forward = model.generate, model.forward
    ocvtp.remove(model)
    assert torch.equal(generate(**inputs, **GREEDY), want[0][0])
    with torch.no_grad():
        assert torch.equal(forward(**inputs).logits, want[1])


# -------------------------------------------------------------------------------- exceptions, interrupts


ERRORS = pytest.mark.parametrize("error", [Fault, KeyboardInterrupt])


@contextlib.contextmanager
def failing(model: Any, kind: Kind, place: str) -> Iterator[dict[str, Any]]:
    def fail() -> None:
        raise kind.error

    with At(model, kind, place, fail) as more, pytest.raises(kind.error):
        yield more


@pytest.mark.parametrize("place", PLACES)
def test_the_call_after_a_failed_one_is_right(kind: Kind, place: str) -> None:
    model, prompts, pruner = kind.model(), kind.prompts(), kind.pruner()
    ocvtp.apply(model, pruner, keep=KEEP)
    told(model, prompts[2])
    before = state(model), set(pruner.__dict__)
    inputs = {**prompts[0], "pixel_values": prompts[0]["pixel_values"].clone()}
    image = weakref.ref(inputs["pixel_values"])
    with failing(model, kind, place) as more:
        told(model, inputs, **more)
    del inputs, more
    gc.collect()
    assert image() is None  # nobody holds what the failed call was about
    assert (state(model), set(pruner.__dict__)) == before
    assert identical(told(model, prompts[0]), kind.told(0))
    assert identical(told(model, prompts[2]), kind.told(2))
    if place in (*VISION_PLACES, "prefill"):
        with failing(model, kind, place), torch.no_grad():
            model(**prompts[0])
        assert (state(model), set(pruner.__dict__)) == before
        assert identical(told(model, prompts[1]), kind.told(1))
    ocvtp.remove(model)
    assert identical(told(model, prompts[0]), kind.told(0, None))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("own", ["static", "dynamic"])
def test_caches_of_failed_calls(kind: Kind, own: str, place: str) -> None:
    """A prompt with images on a cache that a failed call was given: refused, or right."""
    model, inputs = kind.model(), kind.prompts()[0]
    ocvtp.apply(model, kind.pruner(), keep=KEEP)
    if own == "static":  # the model's own, which the next call goes on with
        options = {"cache_implementation": "static", "disable_compile": True}
        told(model, inputs, **options)
        with failing(model, kind, place) as more:
            told(model, inputs, **options, **more)
        for which in (0, 2):
            got = told(model, kind.prompts()[which], **options)
            assert torch.equal(got[0], kind.told(which)[0])
        return
    kv = DynamicCache()
    with failing(model, kind, place) as more:
        told(model, inputs, past_key_values=kv, **more)
    if kv.get_seq_length() == 0:
        assert not any("ocvtp" in name for name in kv.__dict__)
        assert identical(told(model, inputs, past_key_values=kv), kind.told(0))
        return
    follow_up(model, inputs, inputs["input_ids"], kv)


@pytest.mark.parametrize("place", LANGUAGE_PLACES)
def test_a_conversation_after_a_failed_turn(kind: Kind, place: str) -> None:
    """Whatever the failed turn left in the cache, the next one is refused, or right."""
    model, inputs = kind.model(), kind.prompts()[0]
    ocvtp.apply(model, kind.pruner(), keep=KEEP)
    kv = DynamicCache()
    sequences, _ = told(model, inputs, past_key_values=kv)
    uneven = place in ("prefill", "decode")  # in the middle of it, layers don't hold the same
    length = 0 if uneven else kv.get_seq_length()
    ids = torch.cat([sequences, torch.tensor([FOLLOW_UP])], dim=1)
    with failing(model, kind, place) as more:
        told(model, {"input_ids": ids}, past_key_values=kv, **more)
    follow_up(model, inputs, ids, kv, length)


def follow_up(model: Any, images: Inputs, so_far: torch.Tensor, kv: Any, length: int = 0) -> None:
    """Ask something after ``so_far``, whose images are those of ``images``; ``kv`` once held ``length``."""
    ids = torch.cat([so_far, torch.tensor([FOLLOW_UP])], dim=1)
    seen = {**images, "input_ids": ids}
    if "mm_token_type_ids" in seen:
        gap = ids.shape[1] - seen["mm_token_type_ids"].shape[1]
        seen["mm_token_type_ids"] = torch.nn.functional.pad(seen["mm_token_type_ids"], (0, gap))
    want = told(model, seen)
    try:
        got = told(model, {"input_ids": ids}, past_key_values=kv)
    except ValueError as refusal:
        assert "cache" in str(refusal)  # noqa: PT017 (either is fine)
        if not length:
            return
        kv.crop(length - kv.get_seq_length())  # as it was before the failed turn
        got = told(model, {"input_ids": ids}, past_key_values=kv)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", VISION_PLACES)
def test_an_image_that_failed_behind_a_cache_can_be_asked_about_again(kind: Kind, place: str) -> None:
    """The tower comes before the cache, so the conversation goes on as if nothing had happened."""
    needs_images_behind_cache()
    model, (one, two, _) = kind.model(), kind.prompts()
    ocvtp.apply(model, kind.pruner(), keep=KEEP)

    def first() -> tuple[Any, Inputs]:
        kv = DynamicCache()
        sequences, _ = told(model, one, past_key_values=kv)
        ids = torch.cat([sequences, two["input_ids"]], dim=1)
        second = {**two, "input_ids": ids}
        if "mm_token_type_ids" in two:
            second["mm_token_type_ids"] = (ids == tiny_qwen.IMAGE).int()
        return kv, second

    kv, second = first()
    want = told(model, second, past_key_values=kv)
    kv, second = first()
    with failing(model, kind, place) as more:
        told(model, second, past_key_values=kv, **more)
    assert identical(told(model, second, past_key_values=kv), want)


def test_a_failed_backward_pass(kind: Kind) -> None:
    model, inputs = kind.model().train(), kind.prompts()[1]
    ocvtp.apply(model, kind.pruner(), keep=KEEP)
    batch = {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["input_ids"] > 100, -100)}

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want, before = gradients(), state(model)

    def fail(_: torch.Tensor) -> None:
        raise kind.error

    out = model(**batch)
    handle = next(iter(kind.projector(model).parameters())).register_hook(fail)
    with pytest.raises(kind.error):
        out.loss.backward()
    handle.remove()
    assert identical(gradients(), want)
    assert state(model) == before


@pytest.mark.parametrize("outer", [True, False])
def test_an_exception_leaves_pruned(kind: Kind, outer: bool) -> None:
    model, inputs = kind.model(), kind.prompts()[0]
    if outer:
        ocvtp.apply(model, kind.pruner(), keep=KEEP + 2)
    want = told(model, inputs)
    before = state(model)

    def fail() -> None:
        raise kind.error

    def work(place: str) -> None:
        with ocvtp.pruned(model, kind.pruner(seed=4), keep=KEEP), At(model, kind, place, fail) as more:
            told(model, inputs, **more)

    for place in ("pruner", "decode"):
        with pytest.raises(kind.error):
            work(place)
        if not outer:
            assert state(model) == before
        else:  # the adapter is another, of the same model
            assert state(model).keys() == before.keys()
            assert controller_of(model).settings.budget.keep == KEEP + 2
        assert identical(told(model, inputs), want)


@ERRORS
@pytest.mark.parametrize(
    ("module", "name", "calls", "patched"),
    [
        *((patch, name, 1, patched) for name in ("adapter_for", "resolve") for patched in (0, 1)),
        *((methods, "_refuse_foreign", 1, patched) for patched in (0, 1)),
        # Patched models have these already.
        *((methods, name, 1, 0) for name in ("Controller", "_method", "inner_of", "Around")),
        (methods, "_method", 2, 0),
    ],
)
def test_an_exception_while_applying(
    module: Any,
    name: str,
    calls: int,
    patched: int,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All or nothing."""
    kind = Kind("llava")
    model, inputs, pruner = kind.model(), kind.prompts()[0], kind.pruner()
    told(model, inputs)
    unpatched = state(model)
    if patched:
        ocvtp.apply(model, pruner, keep=KEEP + 2)
    before, want = state(model), kind.told(0, KEEP + 2 if patched else None)
    original, count = getattr(module, name), 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            raise error
        return original(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(module, name, fail)
        with pytest.raises(error):
            ocvtp.apply(model, pruner, keep=KEEP)
    assert count == calls
    assert state(model) == before
    assert identical(told(model, inputs), want)
    ocvtp.remove(model)
    assert state(model) == unpatched


@ERRORS
def test_an_exception_while_removing(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Kind("llava")
    model, inputs = kind.model(), kind.prompts()[0]
    unpruned = told(model, inputs)
    unpatched = state(model)
    ocvtp.apply(model, kind.pruner(), keep=KEEP)

    def fail(self: Any) -> None:
        raise error

    with monkeypatch.context() as context:
        context.setattr("ocvtp.pruner.capture.SlotRunner.close", fail)
        with pytest.raises(error):
            ocvtp.remove(model)
    assert identical(told(model, inputs), unpruned)
    ocvtp.remove(model)
    assert state(model) == unpatched
    assert identical(told(model, inputs), unpruned)


def test_measuring_ends_with_the_exception(kind: Kind) -> None:
    model, inputs = kind.model(), kind.prompts()[0]
    ocvtp.apply(model, kind.pruner(), keep=KEEP)
    want = told(model, inputs)
    before = state(model)

    def fail() -> None:
        raise KeyboardInterrupt

    def measure() -> None:
        with ocvtp.vlm.stage_times(model), At(model, kind, "projector", fail):
            told(model, inputs)

    with pytest.raises(KeyboardInterrupt):
        measure()
    assert state(model) == before
    assert identical(told(model, inputs), want)


# ---------------------------------------------------------------------------------------------- processes


def _answer_elsewhere(pruner: bytes, weights: bytes, queue: Any) -> None:
    torch.set_num_threads(1)
    model = llava()
    model.load_state_dict(pickle.loads(weights))
    ocvtp.apply(model, pickle.loads(pruner), keep=KEEP)
    queue.put(model.generate(**prompt(ONE, pixels(1)), **GREEDY).tolist())


def _answer_in_a_fork(model: Any, queue: Any) -> None:
    queue.put(model.generate(**prompt(ONE, pixels(1)), **GREEDY).tolist())


def _result(context: Any, target: Any, *args: Any) -> Any:
    queue = context.SimpleQueue()
    process = context.Process(target=target, args=(*args, queue), daemon=True)
    process.start()
    try:
        assert queue._reader.poll(120), "no answer from the process"
        return queue.get()
    finally:
        process.join(30)
        process.kill()


def test_a_spawned_process() -> None:
    model, pruner = llava(), tiny_llava.pruner()
    ocvtp.apply(model, pruner, keep=KEEP)
    want = model.generate(**prompt(ONE, pixels(1)), **GREEDY).tolist()
    sent = pickle.dumps(pruner), pickle.dumps(model.state_dict())
    assert _result(multiprocessing.get_context("spawn"), _answer_elsewhere, *sent) == want


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process() -> None:
    model = llava()
    ocvtp.apply(model, tiny_llava.pruner(), keep=KEEP)
    want = model.generate(**prompt(ONE, pixels(1)), **GREEDY).tolist()
    assert _result(multiprocessing.get_context("fork"), _answer_in_a_fork, model) == want
    assert model.generate(**prompt(ONE, pixels(1)), **GREEDY).tolist() == want


def test_a_pickled_model_is_pruned_or_refused(kind: Kind) -> None:
    """Never silently something else."""
    model, inputs = kind.model(), kind.prompts()[0]
    try:
        pickle.dumps(model)
    except (AttributeError, TypeError, pickle.PicklingError):
        pytest.skip("this transformers can't pickle the model without the patch either")
    ocvtp.apply(model, kind.pruner(), keep=KEEP)
    try:
        data = pickle.dumps(model)
    except (TypeError, pickle.PicklingError) as refusal:
        assert "ocvtp" in str(refusal)  # noqa: PT017 (either is fine)
        return
    want = logits(model, inputs)
    twin = pickle.loads(data)
    assert torch.equal(logits(twin, inputs), want)
    ocvtp.remove(twin)
    assert "_ocvtp" not in twin.__dict__
    assert logits(twin, inputs).shape[1] == inputs["input_ids"].shape[1]


def test_a_pickled_pruner_and_report() -> None:
    pruner, model = tiny_llava.pruner(), llava()
    report = ocvtp.apply(model, pruner, keep=KEEP)
    assert pickle.loads(pickle.dumps(report)) == report
    twin = pickle.loads(pickle.dumps(pruner))
    want = logits(model, prompt(ONE, pixels(1)))
    ocvtp.apply(model, twin, keep=KEEP)
    assert torch.equal(logits(model, prompt(ONE, pixels(1))), want)
