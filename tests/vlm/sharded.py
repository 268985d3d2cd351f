"""What each of two processes does with a model of which it holds half: see ``test_vlm_sharded.py``.

    python -m torch.distributed.run --nproc_per_node 2 --module tests.vlm.sharded FOLDER CASE ...

A case is ``family/wrapping``, or ``family/wrapping/route`` for another way to the language model. For each,
``FOLDER/RANK.json`` says what differed from the model in one piece.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ocvtp
from ocvtp.vlm import options, select
from ocvtp.vlm.families import adapter_for
from tests.vlm.family import Family, Inputs, families


def units(model: Any, wrapping: str) -> Iterator[Any]:
    """Modules to shard by themselves, inner ones first.

    ``layers`` is what accelerate does without being told; ``tower`` is that and the tower; ``whole_tower`` is
    the tower in one piece; ``every`` is every module there is.
    """
    inner_first = list(model.modules())[:0:-1]
    if wrapping == "every":
        yield from (m for m in inner_first if type(m).forward is not torch.nn.Module.forward and holds(m))
        return
    if wrapping != "whole_tower":
        yield from (m for m in inner_first if type(m).__name__ in model._no_split_modules)
    if wrapping != "layers":
        yield adapter_for(model).tower


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
    if wrapping != "zero3":
        yield from trained_otherwise(family, one, shards)


def trained_otherwise(family: Family, one: Any, shards: Any) -> Iterator[str]:
    """Each process learns from a prompt of its own; the model in one piece from both."""
    rows = [family.rows()[kind] for kind in ("one", "two")]
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
        other = mock.patch.object(options, "route_of", return_value=route[0]) if route else nullcontext()
        with other:
            found[case] = said(known[name], wrapping)
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
