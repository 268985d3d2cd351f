"""The curves: of the pruner alone, and of whole models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from bench.e2e import gate
from bench.e2e.methods import OURS, UNPRUNED, default_variant, methods
from bench.e2e.presets import build
from bench.e2e.prompts import prompt
from bench.micro.gates import GateError
from bench.official import official_attention, official_selection
from bench.scaling.points import curve, point, unpruned_and_ours
from bench.scaling.sizes import Scale
from ocvtp import OCPruner
from ocvtp.pruner.noise import seeded_normal

KEEP = 64
#: Larger images are not compared with the official dataflow, whose selection takes quadratic time in Python.
_CHECKED = 4096
_TEXT = 32

Curve = dict[str, Any]
Done = Callable[[str, str, Mapping[str, Any]], bool]


def pruner_curves(scale: Scale, device: torch.device, done: Done) -> Iterator[Curve]:
    """The pruner against tokens, kept tokens and images in a batch."""
    torch.manual_seed(0)
    pruner = OCPruner().eval().to(device)
    settings = [
        ("tokens", {"keep": KEEP, "batch": 1}, [(1, n, KEEP) for n in scale.tokens]),
        ("kept tokens", {"tokens": scale.wide, "batch": 1}, [(1, scale.wide, k) for k in scale.kept]),
        ("images in a batch", {"tokens": 576, "keep": KEEP}, [(b, 576, KEEP) for b in scale.batches]),
    ]
    for axis, fixed, shapes in settings:
        if done("pruner", axis, fixed):
            continue
        points = []
        for batch, tokens, keep in shapes:
            x = torch.randn(batch, tokens, pruner.config.in_dim, device=device)
            received = torch.rand(batch, tokens, device=device)
            if tokens <= _CHECKED:
                _check(pruner, x, received, keep)
            at = {"tokens": tokens, "kept tokens": keep, "images in a batch": batch}[axis]
            calls = {"pruner": lambda: pruner(x, keep=keep, fill_scores=received)}  # noqa: B023
            points.append(point(at, calls, device, scale.seconds)["pruner"])
        yield curve("pruner", axis, fixed, points)


def _check(pruner: OCPruner, x: torch.Tensor, received: torch.Tensor, keep: int) -> None:
    """The first image's kept tokens are those of the official dataflow; in float32."""
    slots = pruner.initial_slots(seeded_normal(keep, pruner.config.slot_dim, 0)[None].to(x.device)).detach()
    attention = official_attention(x[:1], slots, pruner.weights())
    want = official_selection(attention, received[0], keep)
    got = pruner(x, keep=keep, fill_scores=received, precision="fp32").indices[0].tolist()
    share = len(set(got) & set(want)) / keep
    if share < gate.least_share(keep, x.device):
        raise GateError(f"pruner at {list(x.shape)}, keep {keep}: {share:.1%} of the official tokens")


def model_curves(scale: Scale, device: torch.device, done: Done) -> Iterator[Curve]:
    """Time to the first token, unpruned and pruned, against tokens of an image, images, budget and frames."""
    yield from _curves(
        scale,
        device,
        done,
        scale.qwen(),
        "tokens",
        {"family": "qwen2_5_vl", "keep": KEEP, "text tokens": _TEXT},
        [((side, side), {}, KEEP) for side in scale.sides],
    )
    yield from _curves(
        scale,
        device,
        done,
        scale.llava(),
        "images per prompt",
        {"family": "llava", "tokens per image": 576, "keep per image": KEEP, "text tokens": _TEXT},
        [((336, 336), {"images": images}, KEEP) for images in scale.images],
    )
    yield from _curves(
        scale,
        device,
        done,
        scale.llava(),
        "kept tokens",
        {"family": "llava", "tokens": 576, "text tokens": _TEXT},
        [((336, 336), {}, keep) for keep in scale.budgets],
    )
    yield from _curves(
        scale,
        device,
        done,
        scale.qwen(),
        "frames",
        {"family": "qwen2_5_vl", "tokens per pair": 144, "keep per pair": 16, "text tokens": _TEXT},
        [((336, 336), {"frames": frames}, 16) for frames in scale.frames],
    )


def _curves(
    scale: Scale,
    device: torch.device,
    done: Done,
    config: Any,
    axis: str,
    fixed: Mapping[str, Any],
    shapes: Sequence[tuple[tuple[int, int], dict[str, int], int]],
) -> Iterator[Curve]:
    names = {name: f"time to first token, {name}" for name in (UNPRUNED, OURS)}
    if all(done(name, axis, fixed) for name in names.values()):
        return
    model, pruner = build(config, device)
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number, (image, extra, keep) in enumerate(shapes):
        inputs = prompt(model, image=image, text_tokens=max(_TEXT, 3 * extra.get("images", 1)), **extra)
        if number == 0:
            check_model(model, pruner, keep, inputs)
        is_picture = inputs["input_ids"] == inputs["input_ids"].mode().values
        at = next(iter(extra.values()), keep if axis == "kept tokens" else int(is_picture.sum()))
        call = functools.partial(_first_token, model, inputs)
        found = point(at, unpruned_and_ours(model, pruner, keep, call), device, scale.seconds)
        for name in names:
            points[name].append(found[name])
    for name, what in names.items():
        yield curve(what, axis, fixed, points[name])


@torch.no_grad()
def _first_token(model: Any, inputs: dict[str, Any]) -> None:
    model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(dim=-1).tolist()


def check_model(model: Any, pruner: OCPruner, keep: int, inputs: dict[str, Any]) -> None:
    """The end-to-end benchmark's gate, for a model unpruned and pruned."""
    if "pixel_values_videos" in inputs:  # the end-to-end gate is about images
        inputs = prompt(model, image=(336, 336), text_tokens=_TEXT)
    found = methods(model, pruner, keep, 0)
    names = (UNPRUNED, default_variant(model, pruner, keep))
    gate.check(model, pruner, keep, inputs, {name: found[name] for name in names})
