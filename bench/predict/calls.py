"""What is predicted: calls of the product at published sizes, on ``meta``, and what each of them does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.guard.cases import HALF, WIDTH, empty, folded
from bench.guard.vlm import vision_call, vision_model
from bench.predict.steps import Mark, Step, Steps, between, steps_of
from ocvtp.pruner.capture import SlotRunner
from ocvtp.pruner.pruner import OCPruner
from ocvtp_kernels.received_attention import received_attention
from ocvtp_kernels.slot_attention import top_tokens

#: Tokens of one CLIP-L/14-336 image, its heads and their width.
IMAGE_TOKENS, HEADS, HEAD_WIDTH = 576, 16, 64


class Size(NamedTuple):
    """Images, tokens of each that are chosen among, and how many are kept."""

    images: int
    tokens: int
    keep: int

    def __str__(self) -> str:
        return f"B={self.images} N={self.tokens} K={self.keep}"


SIZES = (Size(1, 576, 64), Size(8, 576, 64), Size(64, 576, 64), Size(1, 2880, 160))


def sections(size: Size) -> Iterator[tuple[str, list[Step]]]:
    """Steps of each part of a call, by :data:`bench.predict.targets.SECTIONS`."""
    yield "slots", steps_of(_slots(size))
    yield "received", steps_of(_received(size))
    if size.tokens == IMAGE_TOKENS:
        yield "exposed", exposed(size.images)
    yield "captured", captured(size)


def _features(size: Size) -> torch.Tensor:
    """As a tower leaves them: of one image behind its class token, of several tiles one after another."""
    if size.tokens == IMAGE_TOKENS:
        return empty(size.images, size.tokens + 1, WIDTH, dtype=HALF)[:, 1:]
    return empty(size.images, size.tokens, WIDTH, dtype=HALF)


def _slots(size: Size) -> Callable[[Steps], object]:
    features, model = _features(size), folded(size.keep, HALF)
    return lambda _: top_tokens(features, *model, backend="triton")


def _received(size: Size) -> Callable[[Steps], object]:
    tiles = size.images * size.tokens // IMAGE_TOKENS
    q = empty(tiles, IMAGE_TOKENS + 1, HEADS, HEAD_WIDTH, dtype=HALF).transpose(1, 2)
    return lambda _: received_attention(q, q, backend="triton")


def exposed(images: int) -> list[Step]:
    """What a patched LLaVA-1.5 does between the end of the last encoder layer it runs and its projector.

    What runs on its lane, slots and fill scores, is beside the tower, and not in it.
    """
    model = vision_model(HALF)
    call = vision_call(model, images)
    body = next(module for name, module in model.named_modules() if name.endswith("encoder.layers"))
    projector = next(module for name, module in model.named_modules() if name.endswith("projector"))

    lane = _Aside()

    def run(noted: Steps) -> None:
        lane.noted = noted

        def leave(*_: Any) -> None:
            noted.mark("layer")

        def arrive(*_: Any) -> None:
            noted.mark("projector")

        hooks = [layer.register_forward_hook(leave) for layer in body.children()]
        hooks.append(projector.register_forward_pre_hook(arrive))
        try:
            call()
        finally:
            for hook in hooks:
                hook.remove()

    with mock.patch("ocvtp.pruner.capture.lane_for", return_value=lane):
        return between(steps_of(run), "layer", "projector")


def captured(size: Size) -> list[Step]:
    """What a call does whose shape comes back: its graph, if it is small enough for one."""
    with torch.device("meta"):
        pruner = OCPruner().eval()
    features, runner, lane = _features(size), SlotRunner(), _Noting()

    def run(noted: Steps) -> None:
        lane.noted = noted
        runner.begin(pruner, features, size.keep, seed=0).get()

    with mock.patch("ocvtp.pruner.capture.lane_for", return_value=lane):
        return [step for step in steps_of(run, before=4) if not isinstance(step, Mark)]


class _Noting:
    """A lane (:class:`ocvtp.pruner.capture.Lane`) whose replays note what was recorded."""

    noted: Steps

    def run(self, work: Callable[[], Any], reads: Sequence[torch.Tensor]) -> Any:
        return work()

    def hold(self, tensors: Sequence[torch.Tensor]) -> None:
        pass

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self.noted.catch_up()
        before = len(self.noted.steps)
        top = work()
        self.noted.catch_up()
        body = self.noted.steps[before:]
        del self.noted.steps[before:]

        def replay() -> None:
            self.noted.catch_up()
            self.noted.steps.extend(body)

        return top, replay

    def mark(self) -> None:
        return None

    def join(self, mark: None, results: Sequence[torch.Tensor]) -> None:
        pass

    def wait(self) -> None:
        pass


class _Aside(_Noting):
    """What runs on it is nobody's step."""

    def run(self, work: Callable[[], Any], reads: Sequence[torch.Tensor]) -> Any:
        self.noted.catch_up()
        before = len(self.noted.steps)
        made = work()
        self.noted.catch_up()
        del self.noted.steps[before:]
        return made
