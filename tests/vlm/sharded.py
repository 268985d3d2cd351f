"""What each of two processes does with a model of which it holds half: see ``test_vlm_sharded.py``.

    python -m torch.distributed.run --nproc_per_node 2 --module tests.vlm.sharded FOLDER CASE ...

A case is ``family/wrapping``, or ``family/wrapping/route`` for another way to the language model. For each,
``FOLDER/RANK.json`` says what differed from the model in one piece.
"""

from __future__ import annotations

import json
import sys
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ocvtp
from ocvtp.vlm import resolving, select
from ocvtp.vlm.call.controller import controller_of
from ocvtp.vlm.families import adapter_for
from tests.vlm.family import Family, Inputs, families


def units(model: Any, wrapping: str) -> Iterator[Any]:
    """Modules to shard by themselves, inner ones first.

    ``layers`` is what accelerate does without being told; ``tower`` is that and the tower; ``whole_tower`` is
    the tower in one piece; ``every`` is every module there is (in it, ``model.model``).
    """
    inner_first = list(model.modules())[:0:-1]
    if wrapping == "every":
        tied = tied_outside(model)
        for module in inner_first:
            if type(module).forward is not torch.nn.Module.forward and holds(module) and not tied(module):
                yield module
        return
    if wrapping != "whole_tower":
        yield from (m for m in inner_first if type(m).__name__ in model._no_split_modules)
    if wrapping != "layers":
        yield adapter_for(model).tower


def tied_outside(model: Any) -> Callable[[Any], bool]:
    """Whether a module shares a parameter with one beside it: FSDP2 takes the two together only."""

    def owned(module: Any) -> Counter[int]:
        return Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))

    everywhere = owned(model)
    return lambda module: any(count < everywhere[p] for p, count in owned(module).items())


def holds(module: Any) -> bool:
    return next(module.parameters(), None) is not None


def sharded(model: Any, wrapping: str) -> Any:
    if wrapping == "zero3":
        import deepspeed

        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        return deepspeed.initialize(model=model, config=settings)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in list(units(model, wrapping)):
        fully_shard(unit, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def differences(family: Family, wrapping: str) -> Iterator[str]:
    """``generate`` comes first, when nothing has been gathered. Training is that of the last choice."""
    both = one, shards = family.model(), family.model()
    choices: list[tuple[Any, Inputs]] = [("attention", {}), ("farthest_point", {}), (family.pruner(), {})]
    choices += [(family.pruner(), option) for option in family.options if "tower" in option]
    batch, picture = family.batch(), family.rows()["one"]
    vision = {name: value for name, value in picture.items() if "ids" not in name and "mask" not in name}
    for model in both:
        ocvtp.apply(model, family.pruner(), keep=family.keep)
    sharded(shards, wrapping)
    with torch.no_grad():
        if not torch.equal(*(model.generate(**batch, do_sample=False, max_new_tokens=3) for model in both)):
            yield "generate"
        for chosen, option in choices:
            for model in both:
                ocvtp.apply(model, chosen, keep=family.keep, **option)
            if not torch.equal(*(model(**batch).logits for model in both)):
                yield f"forward, {chosen if isinstance(chosen, str) else 'pruner'} {option}"
        if not torch.equal(*(select(model, **vision).indices for model in both)):
            yield "select"
        served = controller_of(one).settings.route == "mm_encoder_outputs" and wrapping != "zero3"
        if served and not torch.equal(*(called_around(model, batch) for model in both)):
            yield "around forward"
    if wrapping != "zero3":
        yield from trained_otherwise(family, one, shards, wrapping)


def called_around(model: Any, batch: Inputs) -> torch.Tensor:
    """What a trainer's own ``forward`` on the instance gets of the model inside."""
    patched = model.__dict__["forward"]
    model.forward = types.MethodType(lambda self, **given: self.model(**given).last_hidden_state, model)
    states: torch.Tensor = model(**batch)
    model.forward = patched
    return states


def trained_otherwise(family: Family, one: Any, shards: Any, wrapping: str) -> Iterator[str]:
    """Each process learns from a prompt of its own, if it may; the model in one piece from both."""
    # A projector that is a unit of its own is gathered as often as a process calls it.
    rows = [family.rows()[kind] for kind in (("two", "two") if wrapping == "every" else ("one", "two"))]
    for row in rows:
        row["labels"] = torch.where(row["input_ids"] >= 100, -100, row["input_ids"])
        one(**row).loss.backward()
    shards(**rows[dist.get_rank()]).loss.backward()
    whole = dict(shards.named_parameters())
    for name, parameter in one.named_parameters():
        want, got = parameter.grad, whole[name].grad
        if want is None or got is None:
            if want is not got:
                yield f"gradient of {name}"
            continue
        # That of a key's bias is zero but for rounding: it shifts all logits of a query alike.
        peer = one.get_parameter(name.replace("bias", "weight")) if "k_proj.bias" in name else parameter
        scale = float(peer.grad.abs().max())
        if not torch.allclose(got.full_tensor() * dist.get_world_size(), want, rtol=1e-4, atol=1e-5 * scale):
            yield f"gradient of {name}"


def said(family: Family, wrapping: str) -> list[str]:
    try:
        return list(differences(family, wrapping))
    except Exception:
        return [traceback.format_exc()]


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    known = {family.name: family for family in families()}
    found = {}
    for case in cases:
        name, wrapping, *route = case.split("/")
        other = mock.patch.object(resolving, "route_of", return_value=route[0]) if route else nullcontext()
        with other:
            found[case] = said(known[name], wrapping)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
