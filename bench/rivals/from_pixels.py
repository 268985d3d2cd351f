"""What ``ocvtp.apply`` makes of the pixels that official implementations were given: tower, method, rows.

The other checks begin at stored tensors. These go the product's own way: the small models of the golden
files as transformers builds them today, patched, asked by :func:`ocvtp.vlm.select` and by a call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

import ocvtp
from bench.rivals import models
from bench.rivals.golden import Golden
from ocvtp.methods import relevance_of
from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.rivals import CDPruner, ClipText, HiPrune, Trim, VisionZip, VisPruner
from ocvtp.vlm.towers.tome import run_merging_tower

Tensors = Mapping[str, torch.Tensor]
About = Mapping[str, Any]


class Pair(NamedTuple):
    """What was made, and what is expected.

    Attributes:
        key: of the golden tensor.
        got: integers, to be equal, or floating point, to be close.
        wanted: likewise.
    """

    key: str
    got: torch.Tensor
    wanted: torch.Tensor


def _selected(model: Any, method: Any, keep: int, pixels: torch.Tensor, **vision: Any) -> ocvtp.Selection:
    with ocvtp.pruned(model, method, keep=keep):
        return ocvtp.vlm.select(model, pixels, **vision)


def _rows(selection: ocvtp.Selection) -> torch.Tensor:
    assert selection.reduction is not None
    return selection.reduction.rows


def tome(clip: tuple[About, Tensors], about: About, tensors: Tensors) -> Iterator[Pair]:
    """ToMe: every sub-case through the merging tower, and those with our schedules through ``apply``."""
    model = models.llava(*clip)
    for name, params in about["params"].items():
        if not isinstance(params, dict) or "proportional_attention" not in params:
            continue
        pixels, order = tensors[f"{name}.pixel_values"], tensors[f"{name}.raster"]
        wanted = _at(tensors[f"{name}.tokens"], order)
        proportional, removed = params["proportional_attention"], params["r"][:23]
        merged = run_merging_tower(model.model.vision_tower, pixels, removed, proportional=proportional)
        rank = torch.full_like(tensors[f"{name}.size"][:, :, 0], -1).long()
        rank.scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
        yield Pair(f"{name}.tokens", merged.rows, wanted)
        yield Pair(f"{name}.size", merged.sizes, _at(tensors[f"{name}.size"], order)[:, :, 0])
        yield Pair(f"{name}.group", merged.owner, rank.gather(1, tensors[f"{name}.group"][:, 1:]))
        if name in ("t192", "t128", "t64"):
            made = _rows(_selected(model, "tome", order.shape[1], pixels))
            yield Pair(f"{name}.tokens", made, wanted)


def visionzip(clip: tuple[About, Tensors], about: About, tensors: Tensors) -> Iterator[Pair]:
    """VisionZip as its default splits the budget: all published splits."""
    model = models.llava(*clip)
    for name, params in about["params"]["runs"].items():
        keep = params["dominant"] + params["contextual"]
        for method in ("visionzip", VisionZip(params["contextual"])):
            made = _rows(_selected(model, method, keep, clip[1]["pixel_values"]))
            yield Pair(f"{name}.rows", made, tensors[f"{name}.rows"])


def trim(clip: tuple[About, Tensors], about: About, tensors: Tensors) -> Iterator[Pair]:
    """TRIM, each picture with its own question."""
    model, whole = models.llava(*clip), models.clip(*clip)
    for image, text in enumerate(about["params"]["texts"]):
        live = clip[1]["attention_mask"][image].bool()
        question = ClipText(whole, _Ids({text: clip[1]["input_ids"][image][live].tolist()}), question=text)
        yield Pair("text_embeds", question.embed(text, pieces=False)[0], clip[1]["text_embeds"][image])
        pixels = clip[1]["pixel_values"][image : image + 1]
        for name, params in about["params"]["runs"].items():
            made = _rows(_selected(model, Trim(question), params["rows"], pixels))
            yield Pair(f"{name}.fixed_rows", made[0], tensors[f"{name}.fixed_rows"][image])


def hiprune(clip: tuple[About, Tensors], about: About, tensors: Tensors) -> Iterator[Pair]:
    """HiPrune on whole pictures; its tiles share one budget, so each has its part of it."""
    model = models.llava(*clip)
    for name, params in about["params"].items():
        keep = tensors[f"{name}.kept"].shape[1]
        method = HiPrune(alpha=params.get("alpha", 0.1))
        made = _selected(model, method, keep, clip[1]["pixel_values"]).indices
        yield Pair(f"{name}.kept", made, tensors[f"{name}.kept"])


def fastervlm(clip: tuple[About, Tensors], about: About, tensors: Tensors) -> Iterator[Pair]:
    """FasterVLM."""
    model = models.llava(*clip)
    for name, params in about["params"].items():
        made = _selected(model, "fastervlm", params["T"], clip[1]["pixel_values"]).indices
        yield Pair(f"{name}.kept", made, tensors[f"{name}.kept"])


def prumerge(clip: tuple[About, Tensors], about: About, tensors: Tensors) -> Iterator[Pair]:
    """PruMerge where the published budget is a ratio, which a number of tokens can be."""
    model = models.llava(*clip)
    for name in ("eighth", "ninth"):
        rows = tensors[f"{name}.rows"]
        made = _rows(_selected(model, "prumerge", rows.shape[1], tensors["pixel_values"]))
        yield Pair(f"{name}.rows", made, rows)


def vispruner(clip: tuple[About, Tensors], about: About, tensors: Tensors) -> Iterator[Pair]:
    """VisPruner in float64, one picture at a time: its rule amplifies rounding."""
    model = models.llava(*clip).double()
    for name, params in about["params"].items():
        method = VisPruner(important=params["important_ratio"])
        for image, kept in enumerate(tensors[f"{name}.kept"]):
            pixels = tensors[f"{name}.pixel_values"][image : image + 1].double()
            made = _selected(model, method, params["T"], pixels).indices[0]
            yield Pair(f"{name}.kept", made, kept)


def divprune(clip: tuple[About, Tensors], about: About, tensors: Tensors) -> Iterator[Pair]:
    """DivPrune: the first T of one order."""
    model = models.llava(*clip)
    for params in about["params"].values():
        made = _selected(model, "divprune", params["T"], tensors["pixel_values"]).indices
        yield Pair("order", made, tensors["order"][:, : params["T"]].sort(dim=1).values)


def cdpruner(clip: tuple[About, Tensors], about: About, tensors: Tensors) -> Iterator[Pair]:
    """CDPruner with short questions; a long one's pieces are ours (``fixed_text_embeds``)."""
    model, whole = models.llava(*clip), models.clip(*clip)
    for name, params in about["params"].items():
        if name == "tiles":
            yield from _tiles(model, whole, about, tensors)
            continue
        text, ids = params["text"], tensors[f"{name}.input_ids"]
        if len(ids) == 1:
            question = ClipText(whole, _Ids({text: ids[0][: params["text_tokens"]].tolist()}), question=text)
            made = _selected(model, CDPruner(question), params["T"], tensors[f"{name}.pixel_values"])
            yield Pair(f"{name}.kept", made.indices, tensors[f"{name}.kept"])
        else:
            flat = ids.flatten()[: params["text_tokens"]].tolist()
            question = ClipText(whole, _Ids({text: flat}), question=text)
            made_text = question.embed(text, pieces=True)
            yield Pair(f"{name}.fixed_text_embeds", made_text, tensors[f"{name}.fixed_text_embeds"])


def _tiles(model: Any, clip: Any, about: About, tensors: Tensors) -> Iterator[Pair]:
    """Two tiles of one picture, whose relevance has one scale, and two pictures."""
    short = about["params"]["t64"]
    ids = tensors["t64.input_ids"][0][: short["text_tokens"]].tolist()
    method = CDPruner(ClipText(clip, _Ids({short["text"]: ids}), question=short["text"]))
    keep = about["params"]["tiles"]["T"]
    with ocvtp.pruned(model, method, keep=keep):
        controller = controller_of(model)
        vision: Any = controller.adapter.vision(
            "image", {"pixel_values": tensors["tiles.pixel_values"]}, controller.settings
        )
        with torch.no_grad():
            vision.run(None, None)
            for tiles, key in ((2, "kept"), (1, "separate_kept")):
                evidence = vision.witness([0, 1], tiles)
                made = method.reduce(evidence, keep, None)
                yield Pair(f"tiles.{key}", made.indices, tensors[f"tiles.{key}"])
            image, texts = method.compared(vision.witness([0, 1], 2), None, pieces=True)
    relevance = relevance_of(image, texts, pictures=[0, 0])
    yield Pair("tiles.relevance", relevance, tensors["tiles.relevance"])


def qwen(small: tuple[About, Tensors], about: About, tensors: Tensors, name: str) -> Iterator[Pair]:
    """HiPrune or VisionZip on Qwen2.5-VL: what stays, its positions, and the last logits of the prompt."""
    model = models.qwen(*small)
    for case, params in about["params"].items():
        fixed = params["expect"] == "fixed"
        wanted = tensors[f"{case}.fixed_kept" if fixed else f"{case}.kept"]
        method: Any = (
            HiPrune(alpha=params["alpha"], object_layer=params["object_layer_counted_from_1"] - 1)
            if name == "hiprune"
            else VisionZip(params["contextual"])
        )
        count = params["merged_grid"][0] * params["merged_grid"][1]
        ids = torch.tensor([[7, 8, 9, 10, 11, 102, *[100] * count, 103, *range(20, 28)]])
        grid = torch.tensor([params["grid_thw"]])
        inputs: dict[str, Any] = {"pixel_values": tensors[f"{case}.pixel_values"], "image_grid_thw": grid}
        with ocvtp.pruned(model, method, keep=len(wanted)):
            selection = ocvtp.vlm.select(model, **inputs)
            types = (ids == 100).int()
            with torch.no_grad(), _positions(model) as seen:
                logits = model(input_ids=ids, mm_token_type_ids=types, **inputs).logits
        yield Pair(f"{case}.kept", selection.indices[0], wanted)
        if selection.reduction is not None:
            rows = selection.reduction.by_place().rows[0]
            yield Pair(f"{case}.rows", rows, tensors[f"{case}.rows"])
        if not fixed:
            yield Pair(f"{case}.position_ids", seen[0], tensors[f"{case}.position_ids"])
            yield Pair(f"{case}.last_logits", logits[:, -1], tensors[f"{case}.last_logits"])


@contextlib.contextmanager
def _positions(model: Any) -> Iterator[list[torch.Tensor]]:
    """Positions in three dimensions that the language model is given meanwhile."""
    seen: list[torch.Tensor] = []

    def look(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["position_ids"][-3:])

    hook = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


#: Golden file -> the check of what it holds.
_FROM_CLIP: dict[str, Callable[[tuple[About, Tensors], About, Tensors], Iterator[Pair]]] = {
    "cdpruner_tower": cdpruner,
    "divprune_tower": divprune,
    "fastervlm_tower": fastervlm,
    "hiprune_tower": hiprune,
    "prumerge_tower": prumerge,
    "tome_tower": tome,
    "trim_tower": trim,
    "visionzip_tower": visionzip,
    "vispruner_tower": vispruner,
}
_FROM_QWEN = {"hiprune_qwen": "hiprune", "visionzip_qwen": "visionzip"}


def is_from_pixels(name: str) -> bool:
    """Whether a golden file of this name has pictures that a tower is run on."""
    return name in _FROM_CLIP or name in _FROM_QWEN


def pairs(golden: Golden) -> Iterator[Pair]:
    """What is made of a file's pictures, and what is expected; nothing for files without any."""
    about, tensors = golden.about, golden.tensors
    if golden.name in _FROM_CLIP:
        yield from _FROM_CLIP[golden.name](_weights(golden, "tower_clip"), about, tensors)
    elif golden.name in _FROM_QWEN:
        yield from qwen(_weights(golden, "tower_qwen"), about, tensors, _FROM_QWEN[golden.name])


def _weights(golden: Golden, name: str) -> tuple[About, Tensors]:
    beside = Golden.read(golden.path.with_name(f"{name}.safetensors"))
    return beside.about, beside.tensors


class _Ids:
    """A tokenizer of the texts whose ids a golden file holds."""

    def __init__(self, known: Mapping[str, list[int]]) -> None:
        self._known = known

    def __call__(self, text: str) -> Any:
        return type("Encoded", (), {"input_ids": self._known[text]})


def _at(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
