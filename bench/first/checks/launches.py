"""Every launch of the slots, timed, beside what the model says of the very same code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from bench.first.checks.setting import Setting
from bench.first.run import Finding
from bench.micro.slot_inputs import random_features, random_models
from ocvtp_kernels._arch import architecture, interpreting
from ocvtp_kernels._launch import Launch, launch, recording
from ocvtp_kernels.slot_attention import top_tokens

Predict = Callable[[Launch, int], Finding]


def launches(setting: Setting) -> Iterator[Finding]:
    """One image and many: each launch alone, replayed from a graph, then the whole call."""
    model = random_models(setting.widths, setting.slots, setting.device).mixed
    predict = _predictor(setting)
    for images in (1, setting.batch):
        generator = torch.Generator(setting.device).manual_seed(0)
        x = random_features(images, setting.tokens, setting.widths.features, torch.float16, generator)
        whole = functools.partial(top_tokens, x, *model, backend="triton")
        whole()
        with recording() as made:
            whole()
        for one in made:  # each leaves the next one real inputs
            _again(one, setting.device)
        alike: dict[str, list[int]] = {}
        for number, one in enumerate(made):
            alike.setdefault(_kind(one), []).append(number)
        total = 0.0
        for numbers in alike.values():
            one = made[numbers[0]]
            us = _alone(made, numbers[0], setting)
            total += us * len(numbers)
            places = ", ".join(str(number + 1) for number in numbers)
            what = f"B={images}, launch {places}: {one.kernel.fn.__name__}"
            yield {"what": what, "us": us, **predict(one, images)}
        us = setting.graph_us([whole])
        yield {"what": f"B={images}, whole call", "us": us, "sum of its launches": total}


def _alone(made: list[Launch], number: int, setting: Setting) -> float:
    """Microseconds of one launch; of one that counts, behind who sets its counters to zero, less that one."""
    pair = made[max(number - 1, 0) : number + 1]
    calls = [functools.partial(_again, each, setting.device) for each in pair]
    if not made[number].phases:
        return setting.graph_us(calls[-1:])
    return 2 * setting.graph_us(calls) - setting.graph_us(calls[:1])  # of two calls, one's share


def _kind(one: Launch) -> str:
    """The same for launches that do the same to other tensors."""
    arguments = [
        (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value
        for value in one.arguments
    ]
    return str((one.kernel.fn.__name__, one.grid, sorted(one.tile.items()), arguments))


def _again(one: Launch, device: torch.device) -> torch.Tensor:
    launch(one.kernel, one.grid, device, *one.arguments, **one.tile)
    return next(value for value in one.arguments if isinstance(value, torch.Tensor))


def _predictor(setting: Setting) -> Predict:
    """What ``bench.predict`` says, where it compiles for the GPU at hand."""
    if interpreting() or architecture(setting.device) != "sm90":
        return lambda one, images: {}
    from bench.predict.kernel import Counter
    from bench.predict.timed import times

    counter = Counter()

    def predict(one: Launch, images: int) -> Finding:
        try:
            found = times(one, images, counter)
        except Exception as error:  # a prediction must not cost a measurement
            return {"prediction": f"failed, {error}"}
        return {
            "predicted": [found.total(0), found.total(1)],
            "issue": found.issue,
            "tensor": found.tensor,
            "L2": list(found.l2),
        }

    return predict
