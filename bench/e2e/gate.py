"""What must hold before a whole model is timed: the kept tokens and the answers of the reference path.

The reference is upstream's own code on a prompt shortened by hand: all image features, as the unpatched model
makes them, in the embedded prompt; rows of dropped tokens cut out; tokens decoded by calls of ``forward``.
Where kept tokens stand for others, means are taken by hand as well, and weights are in a mask that is passed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ocvtp
from bench.e2e.methods import INSIDES, OFFICIAL, OURS, UNPRUNED, VARIANTS, WEIGHED, Method
from bench.e2e.official import Kept, OfficialDataflow
from bench.e2e.prompts import Inputs
from bench.e2e.standing import stand_by_hand
from bench.micro.gates import GateError, require_error, worst_error
from bench.rivals import in_llm
from ocvtp import OCPruner
from ocvtp.vlm import select
from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.contracts.reducer import Reducer
from ocvtp.vlm.contracts.settings import Settings
from ocvtp.vlm.encode.encode import choose, encode
from ocvtp.vlm.encode.questions import Asking, questions_of
from ocvtp_kernels.selection import gather_tokens

#: Largest relative error of the first token's logits, ``|got - want| / |want|``.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
#: Least share of float32's tokens that the default precision must keep here, with random weights, whose slots
#: are nearly alike; what it keeps of photographs, with trained ones, is in ``docs/kernels.md``.
SAME_BY_DEFAULT = 0.5
_TOKENS = 3
_GOLDEN = Path(__file__).parents[2] / "tests" / "data" / "rivals_llm"
_GOLDEN_CASES = {"FastV": "fastv_a", "DART": "dart_b", "PyramidDrop": "pdrop_b", "SparseVLM": "sparsevlm1_b"}


class Answer(NamedTuple):
    """Greedy decoding, step by step."""

    tokens: torch.Tensor  # [B, n]
    logits: torch.Tensor  # [B, n, V]


def check(
    model: Any, pruner: OCPruner, keep: int, inputs: Inputs, methods: Mapping[str, Method]
) -> list[str]:
    """Check all methods on one call's inputs; what was found, in words.

    Raises:
        GateError: an implementation computes something else than it should.
    """
    found = [_everything(model, inputs), *_by_default(model, pruner, keep, inputs)]
    features = _features(model, inputs)
    for name, method in methods.items():
        if name in (UNPRUNED, OFFICIAL, *INSIDES):
            continue
        with method.active() as runner:
            want = decode(model, by_hand(model, inputs, features), _TOKENS)
            tokens, logits = runner.answer(inputs, _TOKENS)
            _agree(name, tokens, want, BOUNDS[model.dtype])
            require_error(f"{name}: logits", worst_error(logits, want.logits[:, 0]), BOUNDS[model.dtype])
    inside = [name for name in methods if name in INSIDES]
    if inside:
        found.append(_inside(inside))
    names = ", ".join(name for name in methods if name not in (UNPRUNED, OFFICIAL, *INSIDES))
    found.append(f"{names}: first logits and {_TOKENS} greedy tokens are those of a prompt shortened by hand")
    if OFFICIAL in methods:
        found += _against_official(model, pruner, keep, inputs)
    return found


def _inside(names: Sequence[str]) -> str:
    """Methods inside a language model: every step of the official code, which nothing here does by hand."""
    compared = 0
    for name in names:
        for finding in in_llm.check(_GOLDEN / f"{_GOLDEN_CASES[name]}.safetensors"):
            compared += 1
            if not finding.ok:
                raise GateError(
                    f"{name}: {finding.key} is off by {finding.error:.2e} from the official code's"
                )
    return f"{', '.join(names)}: {compared} tensors of the official code"


@torch.no_grad()
def _features(model: Any, inputs: Inputs) -> torch.Tensor:
    """Rows of all image tokens ``[n, D]``, by the unpatched model."""
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    found = model.get_image_features(**{name: inputs[name] for name in names if name in inputs})
    return torch.cat(list(getattr(found, "pooler_output", found)))


def by_hand(model: Any, inputs: Inputs, rows: torch.Tensor) -> Inputs:
    """The patched model's prompt, of rows that upstream made: embeddings, mask and, for M-RoPE, positions.

    Where the model weighs its tokens, the mask is ``[B, 1, S, S]``, what to add to attention's logits.
    """
    controller = controller_of(model)
    adapter, settings = controller.adapter, controller.settings
    with torch.no_grad():
        ids = inputs["input_ids"]
        asking = functools.partial(questions_of, ids, ids != adapter.token_id("image"))
        kept = encode(adapter, inputs, settings, None, asking=asking)["image"]
        where = ids == adapter.token_id("image")
        places = kept.places(ids.device)
        mass = None
        if settings.standing:
            means, mass = stand_by_hand(model, inputs, rows, places, BOUNDS[model.dtype])
            rows = rows if settings.merge == "off" else means
        if isinstance(settings.selector, Reducer):
            rows = rows.index_copy(0, places, _of_method(model, settings, inputs, asking).to(rows))
        text = model.get_input_embeddings()(ids)
        long = text.masked_scatter(where[..., None], rows.to(text))
        stays = ~where
        placeholders = where.flatten().nonzero()[:, 0]
        stays.view(-1)[placeholders[places]] = True
        batch = len(ids)
        short = {
            "inputs_embeds": long[stays].unflatten(0, (batch, -1)),
            "attention_mask": ids.new_ones(batch, int(stays.sum()) // batch),
        }
        if settings.weigh:
            assert mass is not None
            masses = torch.ones_like(ids, dtype=torch.float32).masked_scatter(where, mass)
            short["attention_mask"] = _weighted(masses[stays].unflatten(0, (batch, -1)).log(), text.dtype)
        if adapter.mrope:
            positions = adapter.positions(ids, inputs["attention_mask"], inputs)
            short["position_ids"] = positions[:, stays].unflatten(1, (batch, -1))
    return short


def _of_method(model: Any, settings: Settings, inputs: Inputs, asking: Asking) -> torch.Tensor:
    """Rows ``[n, D]`` of all pictures of a method that is not ours, from its choice and upstream's own tower.

    What it chose, or the rows that it made of the tower's features, are what golden tensors prove; how they
    get into the prompt is what is checked here.
    """
    adapter: Any = controller_of(model).adapter
    (selection,) = choose(adapter, inputs, settings, asking=asking)
    made = selection.reduction
    if model.config.model_type == "qwen2_5_vl":
        every = _features(model, inputs).unflatten(0, (len(selection.indices), -1))
        found = gather_tokens(every, selection.indices) if made is None else made.by_place().rows
        return found.flatten(0, 1)
    pixels = inputs["pixel_values"]
    tiles = pixels.flatten(0, 1) if pixels.ndim == 5 else pixels
    if made is None:
        hidden = model.model.vision_tower(tiles, output_hidden_states=True).hidden_states
        features = hidden[model.config.vision_feature_layer][:, 1:]
        every = model.model.multi_modal_projector(features).unflatten(0, (len(selection.indices), -1))
        found = gather_tokens(every.flatten(1, 2), selection.indices)
    else:
        found = model.model.multi_modal_projector(made.rows)
    if hasattr(model.model, "image_newline"):
        line = model.model.image_newline.to(found).expand(len(found), 1, -1)
        found = torch.cat([found, line], dim=1)
    return found.flatten(0, 1)


def _weighted(bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of what to add for each key ``[B, S]``: a causal mask ``[B, 1, S, S]``."""
    length = bias.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=bias.device).tril()
    return torch.where(seen, bias[:, None, None].to(dtype), torch.finfo(dtype).min)


@torch.no_grad()
def decode(model: Any, prompt: Inputs, count: int) -> Answer:
    """Greedy decoding of an embedded prompt by ``forward`` alone, on the unpatched path."""
    forward = controller_of(model).originals["forward"]
    tokens, logits = [], []
    positions = prompt.get("position_ids")
    output = forward(**prompt, use_cache=True, logits_to_keep=1)
    for step in range(count):
        logits.append(output.logits[:, -1].float())
        tokens.append(logits[-1].argmax(dim=-1))
        if step + 1 == count:
            break
        given: Inputs = {
            "input_ids": tokens[-1][:, None],
            "attention_mask": _longer(prompt["attention_mask"], step + 1),
            "past_key_values": output.past_key_values,
        }
        if positions is not None:
            following = positions.amax(dim=(0, 2)) + 1 + step
            given["position_ids"] = following[None, :, None].expand(3, -1, 1)
        output = forward(**given, use_cache=True, logits_to_keep=1)
    return Answer(torch.stack(tokens, dim=1), torch.stack(logits, dim=1))


def _longer(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """The mask of a prompt for the last of so many more tokens, which sees all and is nobody's mean."""
    if mask.ndim == 2:
        return torch.nn.functional.pad(mask, (0, tokens), value=1)
    return torch.nn.functional.pad(mask[:, :, -1:], (0, tokens))


def _everything(model: Any, inputs: Inputs) -> str:
    """A patch that drops nothing changes nothing, whatever it would do with dropped tokens."""
    ids = inputs["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": _TOKENS, "do_sample": False}
    want = model.generate(**inputs, **options)[:, ids.shape[1] :]
    for name in (OURS, WEIGHED):
        with ocvtp.pruned(model, "grid", keep=1.0, **VARIANTS[name]):
            got = model.generate(**inputs, **options)[:, ids.shape[1] :]
        if not torch.equal(got, want):
            raise GateError(
                f"{name}, all tokens kept: {got.tolist()} instead of the unpatched model's {want.tolist()}"
            )
    return f"all tokens kept: {_TOKENS} greedy tokens are those of the unpatched model"


def _by_default(model: Any, pruner: OCPruner, keep: int, inputs: Inputs) -> list[str]:
    """Where kernels compute: tokens of the default precision are those of PyTorch in float32."""
    plain = VARIANTS[OURS]
    with ocvtp.pruned(model, pruner, keep=keep, **plain) as report:
        if report.backend == "torch":
            return []
        ours = _kept(model, inputs)
    with ocvtp.pruned(model, pruner, keep=keep, backend="torch", precision="fp32", **plain):
        share = _share(ours, _kept(model, inputs))
    if not share >= SAME_BY_DEFAULT:
        raise GateError(f"{report.precision} keeps {share:.1%} of the tokens that float32 keeps")
    return [f"{OURS} in {report.precision} keeps {share:.1%} of the tokens that PyTorch in float32 keeps"]


def _kept(model: Any, inputs: Inputs) -> torch.Tensor:
    """Indices that a patched model keeps of the images among ``inputs``."""
    return select(model, **controller_of(model).of_images(inputs)).indices


def _share(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of ``ours`` ``[B, k]`` in ``theirs``, image by image."""
    found = [torch.isin(own, other).double().mean() for own, other in zip(ours, theirs, strict=True)]
    return torch.stack(found).mean().item()


def least_share(keep: int, device: torch.device) -> float:
    """Of the official dataflow's tokens, that ours in float32 must keep of an image.

    All of them on a CPU. On a GPU sums are ordered otherwise, and a near tie may go the other way.
    """
    return 1.0 if device.type == "cpu" else 1.0 - max(1, keep // 20) / keep


def _against_official(model: Any, pruner: OCPruner, keep: int, inputs: Inputs) -> list[str]:
    """Ours in float32 keeps what the published dataflow keeps, and reads it alike."""
    options: dict[str, Any] = {"precision": "fp32", **VARIANTS[OURS]}
    if model.config.model_type == "llava_next":
        options["layout"] = "official"

    def both(given: Inputs) -> tuple[OfficialDataflow, Kept, torch.Tensor]:
        official = OfficialDataflow(model, pruner, keep)
        with ocvtp.pruned(model, pruner, keep=keep, **options):
            return official, official.encode(given), _kept(model, given)

    with _wide_vision(model, inputs) as wide:
        official, theirs, ours = both(wide)
    share, least = _share(ours, theirs.indices), least_share(keep, ours.device)
    if not share >= least:
        raise GateError(f"{share:.2%} of the kept tokens are the official dataflow's, fewer than {least:.0%}")
    found = [f"{OURS} in float32 keeps {share:.1%} of the tokens that the {OFFICIAL} keeps"]
    if wide is not inputs:
        official, theirs, ours = both(inputs)
    if not torch.equal(ours, theirs.indices):  # rounding decided
        return found
    with torch.no_grad():
        want = model(**official.splice(inputs, theirs), use_cache=True, logits_to_keep=1).logits[:, -1]
        with ocvtp.pruned(model, pruner, keep=keep, **options):
            got = model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
    require_error(f"{OFFICIAL}: logits", worst_error(got, want), BOUNDS[model.dtype])
    return [*found, f"{OFFICIAL}: first logits are ours"]


@contextlib.contextmanager
def _wide_vision(model: Any, inputs: Inputs) -> Iterator[Inputs]:
    """Tower and projector in float32, and pixels that go with them; afterwards as before, to the bit."""
    if model.dtype == torch.float32:
        yield inputs
        return
    modules, before = (model.model.vision_tower, model.model.multi_modal_projector), model.dtype
    for module in modules:
        module.float()
    try:
        yield {**inputs, "pixel_values": inputs["pixel_values"].float()}
    finally:
        for module in modules:
            module.to(before)


def _agree(name: str, tokens: torch.Tensor, want: Answer, rounding: float) -> None:
    """Every token as in the reference, up to one that rounding may decide, from which on answers may part."""
    for row, (given, expected, logits) in enumerate(zip(tokens, want.tokens, want.logits, strict=True)):
        for step, (token, other) in enumerate(zip(given.tolist(), expected.tolist(), strict=True)):
            if token == other:
                continue
            gap = (logits[step, other] - logits[step, token]) / logits[step].abs().max()
            if gap <= rounding:
                break
            raise GateError(f"{name}: token {step} of row {row} is {token}, by hand it is {other}")
