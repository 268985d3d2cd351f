"""What the suite of all families has to know about one of them.

Adding a family to the suite is one file in ``tests/vlm/families`` with a ``FAMILY``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from ocvtp import OCPruner, PrunerConfig
from tests.vlm.skips import VERSION
from tests.vlm.tiny_llava import GREEDY, PAD

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """Tokens that one choice is made among.

    Attributes:
        features: ``[N, C]`` of the pruner's layer.
        scores: ``[N]`` received attention.
        slots: ``[N]`` the placeholder of each candidate.
        sources: ``[N, C]`` what the projector reads of each candidate, then the same of DeepStack layers;
            nothing where it doesn't read them one by one.
        project: such ``sources`` of other tokens, ``[k, C]`` each -> rows ``[k, D]`` each.
    """

    features: torch.Tensor
    scores: torch.Tensor
    slots: torch.Tensor
    sources: Sequence[torch.Tensor] = ()
    project: Callable[..., Sequence[torch.Tensor]] = lambda *sources: ()


@dataclass(frozen=True)
class Seen:
    """An image or video as transformers itself sees it.

    Attributes:
        choices: what is chosen among.
        rows: ``[placeholders, D]`` features that the unpruned model puts in the prompt.
        deep: DeepStack features, likewise.
        always: kept slots -> the slots that stay besides.
        compact_rows: kept indices -> rows, where they are not ``rows`` at the kept slots.
    """

    choices: Sequence[Choice]
    rows: torch.Tensor
    deep: Sequence[torch.Tensor] = ()
    always: Callable[[torch.Tensor], torch.Tensor] = lambda kept: kept[:0]
    compact_rows: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True, eq=False)  # hashed by identity, so that models can be kept
class Family:
    """A family under test.

    Attributes:
        name: ``model_type``.
        model: makes a tiny random model, always the same; takes the attention implementation.
        width: of the features a pruner reads.
        unit: patches along the side of a token.
        layer: that a pruner reads.
        rows: kind -> inputs of an unpadded prompt: ``"one"`` image, ``"two"``, ``"text"``, maybe ``"video"``.
        seen: what transformers makes of the pixels of such inputs: modality -> images.
        pixels: modality -> ``(argument of the pixels, arguments beside it)``, all joined along dimension 0.
        options: variants of ``apply``'s options besides the default.
        keep: a budget below all candidates.
        positions: numberings it can have.
        since: oldest transformers.
        mrope: positions have three dimensions.
        image_turns: oldest transformers where an image behind a cache is attended to as in one prompt.
        turns: a second turn means what it does in one prompt (a prefix LM attends both ways in the first).
        second: text and image of a second turn: ids (without the conversation before) and pixels.
    """

    name: str
    model: Callable[..., Any]
    width: int
    rows: Callable[[], dict[str, Inputs]]
    seen: Callable[[Any, Inputs, OCPruner, Inputs], dict[str, list[Seen]]]
    second: Callable[[], Inputs]
    unit: int = 1
    layer: int = 2
    pixels: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {"image": ("pixel_values",), "video": ("pixel_values_videos",)}
    )
    options: Sequence[Inputs] = ()
    keep: int = 5
    positions: Sequence[str] = ("compact", "original")
    since: str = "5.0"
    mrope: bool = False
    image_turns: str = "5.0"
    turns: bool = True

    def pruner(self, **changes: Any) -> OCPruner:
        """A pruner that fits, always the same."""
        torch.manual_seed(3)
        sizes = {"in_dim": self.width, "layer": self.layer, "unit": self.unit, **changes}
        made = OCPruner(PrunerConfig(hidden_dim=96, slot_dim=32, ffn_dim=64, **sizes)).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.ndim == 2:
                    parameter.copy_(1.5 * torch.randn(parameter.shape) * parameter.shape[1] ** -0.5)
        return made

    def batch(self, kinds: Sequence[str] | None = None, side: str = "left") -> Inputs:
        """The rows as one padded batch."""
        rows = self.rows()
        return joined([rows[kind] for kind in (kinds or rows)], side)


def joined(rows: Sequence[Inputs], side: str = "left") -> Inputs:
    """Unpadded prompts as one padded batch; pixels and what describes them one after another."""
    width = max(row["input_ids"].shape[1] for row in rows)
    out: Inputs = {}

    def padded(tensor: torch.Tensor, fill: int) -> torch.Tensor:
        gap = width - tensor.shape[1]
        return torch.nn.functional.pad(tensor, (gap, 0) if side == "left" else (0, gap), value=fill)

    along = ("input_ids", "mm_token_type_ids", "token_type_ids", "labels")
    fills = {"input_ids": PAD, "labels": -100}
    for name in along:
        if any(name in row for row in rows):
            columns = [row.get(name, torch.zeros_like(row["input_ids"])) for row in rows]
            out[name] = torch.cat([padded(column, fills.get(name, 0)) for column in columns])
    out["attention_mask"] = torch.cat([padded(torch.ones_like(row["input_ids"]), 0) for row in rows])
    for name in {name for row in rows for name in row} - set(along) - {"attention_mask"}:
        parts = [row[name] for row in rows if name in row]
        if parts[0].ndim == 5:  # tiles or frames: padded to the most
            most = max(part.shape[1] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, 0) * 3 + (0, most - part.shape[1])) for part in parts]
        out[name] = torch.cat(parts)
    return out


def inputs_of(modules: Sequence[torch.nn.Module], run: Callable[[], Any]) -> tuple[Any, list[torch.Tensor]]:
    """What ``run`` returns, and the first argument that each of ``modules`` was called with meanwhile."""
    seen: dict[int, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, i=i: seen.update({i: args[0]}))
        for i, module in enumerate(modules)
    ]
    try:
        returned = run()
    finally:
        for handle in handles:
            handle.remove()
    return returned, [seen[i] for i in range(len(modules))]


def numberings(family: Family) -> list[str]:
    """``positions`` that the family can have on this transformers."""
    old = Version("5.10") > VERSION and not family.mrope
    return [positions for positions in family.positions if positions == "compact" or not old]


def packed(family: Family, model: Any, rows: Sequence[Sequence[Inputs]]) -> Inputs:
    """Documents one behind the other in each row, as flattening collators pack them: positions start over.

    A shorter row is filled up with documents of one token, as without a mask nothing else is padding.
    """
    visual = {name for group in family.pixels.values() for name in group}
    documents = [document for row in rows for document in row]
    made = joined([{"input_ids": torch.tensor([[1]]), **_only(document, visual)} for document in documents])
    out = _only(made, visual)
    width = max(sum(document["input_ids"].shape[1] for document in row) for row in rows)
    fills = {"input_ids": PAD, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "position_ids": 0}
    for name, fill in fills.items():
        parts = []
        for row in rows:
            given = [_along(family, model, document, name) for document in row]
            if any(part is None for part in given):
                break
            joint = torch.cat(given, dim=-1)
            parts.append(torch.nn.functional.pad(joint, (0, width - joint.shape[-1]), value=fill))
        else:
            out[name] = torch.cat(parts, dim=-2)
    return out


def _only(inputs: Inputs, names: set[str]) -> Inputs:
    return {name: value for name, value in inputs.items() if name in names}


def _along(family: Family, model: Any, document: Inputs, name: str) -> Any:
    """A tensor along a document's tokens; ``None`` if it has no such."""
    if name != "position_ids":
        return document.get(name)
    text = torch.arange(document["input_ids"].shape[1])[None]
    if family.mrope:
        return torch.cat([text[None], rope_positions(model, document)])
    return text + int(family.name == "paligemma")


def families() -> list[Family]:
    """All of them that this transformers has."""
    folder = Path(__file__).parent / "families"
    names = sorted(path.stem for path in folder.glob("*.py"))
    made = [importlib.import_module(f"tests.vlm.families.{name}") for name in names]
    found = [family for module in made for family in module.FAMILIES]
    return [family for family in found if Version(family.since) <= VERSION]


def by_name(name: str) -> Family:
    """One of them; skips the test where this transformers doesn't have it."""
    for family in families():
        if family.name == name:
            return family
    pytest.skip(f"{name} needs a newer transformers")


def by_hand(
    family: Family, model: Any, pruner: OCPruner, inputs: Inputs, keep: int, positions: str, options: Inputs
) -> torch.Tensor:
    """Logits of the pruned prompt, built from what transformers sees of the images."""
    ids = inputs["input_ids"][0]
    seen = family.seen(model, inputs, pruner, options)
    stays = torch.ones_like(ids, dtype=torch.bool)
    rows: dict[str, list[torch.Tensor]] = {}
    deep: dict[str, list[list[torch.Tensor]]] = {}
    for modality, images in seen.items():
        where = (ids == getattr(model.config, f"{modality}_token_id")).nonzero()[:, 0]
        start = 0
        for image in images:
            slots, indices = chosen(image, pruner, keep)
            if image.compact_rows is None:
                kept = image.rows[slots]
            else:
                kept = image.compact_rows(indices)
                slots = torch.arange(len(kept))
            columns = where[start : start + len(image.rows)]
            stays[columns] = False
            stays[columns[slots]] = True
            rows.setdefault(modality, []).append(kept)
            deep.setdefault(modality, []).append([layer[slots] for layer in image.deep])
            start += len(image.rows)
        assert start == len(where)
    columns = stays.nonzero()[:, 0]
    return _logits(family, model, inputs, columns, rows, deep, positions)


def chosen(image: Seen, pruner: OCPruner, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Placeholders of an image that stay, and the candidates kept of its last choice."""
    slots, indices = [], torch.empty(0)
    for choice in image.choices:
        indices = pruner(
            choice.features[None], min(keep, len(choice.features)), fill_scores=choice.scores[None]
        ).indices[0]
        slots.append(choice.slots[indices])
    kept = torch.cat(slots)
    return torch.cat([kept, image.always(kept)]).sort().values, indices


def _logits(
    family: Family,
    model: Any,
    inputs: Inputs,
    columns: torch.Tensor,
    rows: dict[str, list[torch.Tensor]],
    deep: dict[str, list[list[torch.Tensor]]],
    positions: str,
) -> torch.Tensor:
    short = inputs["input_ids"][:, columns]
    if family.mrope:
        numbers = rope_positions(model, inputs)[:, :, columns]
    elif positions == "original":
        numbers = columns[None]
    else:
        numbers = torch.arange(len(columns))[None]
    extra: Inputs = {"attention_mask": torch.ones_like(short), "position_ids": numbers}
    for name in ("token_type_ids",):
        if name in inputs:
            extra[name] = inputs[name][:, columns]
    if any(layers for images in deep.values() for layers in images):
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        outputs = {
            modality: BaseModelOutputWithDeepstackFeatures(
                pooler_output=rows[modality],
                deepstack_features=[list(layer) for layer in zip(*deep[modality], strict=True)],
            )
            for modality in rows
        }
        with_deep: torch.Tensor = model(input_ids=short, mm_encoder_outputs=outputs, **extra).logits
        return with_deep
    embeds = model.get_input_embeddings()(short)
    for modality, kept in rows.items():
        where = short == getattr(model.config, f"{modality}_token_id")
        embeds = embeds.masked_scatter(where[..., None], torch.cat(kept))
    out: torch.Tensor = model(inputs_embeds=embeds, **extra).logits
    return out


def assert_rows_answer_alike(
    batch: Any, width: int, alone: list[Any], rows: list[Inputs], tolerance: float = 1e-4
) -> None:
    """What a padded batch of prompts said, ``width`` columns wide, and what each row said alone."""
    for i, (one, row) in enumerate(zip(alone, rows, strict=True)):
        new = one.sequences[0, row["input_ids"].shape[1] :]
        assert torch.equal(new, batch.sequences[i, width:]), i
        for step_alone, step in zip(one.logits, batch.logits, strict=True):
            torch.testing.assert_close(step_alone[0], step[i], atol=tolerance, rtol=tolerance)


@functools.cache
def made(family: Family) -> Any:
    """The family's model, one for all tests: leave it as it is, see the fixture ``models``."""
    return family.model()


def steps(model: Any, inputs: Inputs, **options: Any) -> Any:
    """What ``generate`` says greedily, with the logits of every step."""
    return model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True, **options)


def rope_positions(model: Any, inputs: Inputs) -> torch.Tensor:
    """``[3, 1, S]`` of a prompt, by transformers."""
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    passed = {name: inputs[name] for name in names if name in inputs}
    ids = inputs["input_ids"]
    kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
    made: torch.Tensor = model.model.get_rope_index(ids, mm_token_type_ids=kinds, **passed)[0]
    return made
