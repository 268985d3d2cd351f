"""ToMe: single steps from stored metrics; of whole towers what needs none."""

from __future__ import annotations

import ast

import torch

from bench.rivals.golden import Case
from ocvtp.methods import tome


def check(case: Case) -> None:
    """``tome_match`` and ``tome_tower``."""
    if case.golden.name == "tome_tower":
        _tower(case)
    else:
        _step(case)


def _step(case: Case) -> None:
    params = case.params
    pairs = tome.match(
        case["metric"],
        params["r"],
        class_token=params["class_token"],
        distill_token=params["distill_token"],
    )
    sources, destinations = pairs.sources // 2, pairs.destinations // 2
    if case.fixed:  # which of two equal pairs comes first is an accident, but both merge
        by_place, official = sources.argsort(dim=1), case["src"].argsort(dim=1)
        case.same("src", sources.gather(1, by_place), case["src"].gather(1, official))
        case.same("dst", destinations.gather(1, by_place), case["dst"].gather(1, official))
    else:
        case.same("src", sources)
        case.same("dst", destinations)
    case.same("unmerged", pairs.unmerged // 2)
    rows, size = tome.merge(case["x"], case["size"], pairs)
    prefix = "fixed_" if case.fixed else ""
    case.close(f"{prefix}merged", rows)
    case.close(f"{prefix}new_size", size, 0.0)
    case.same(f"{prefix}group", pairs.owner)
    if case.fixed:
        case.needless("merged", "new_size", "group")


def _tower(case: Case) -> None:
    params, group = case.params, case["group"]
    tokens = params["tokens_after_block"][-1]
    counts = torch.stack([torch.bincount(row, minlength=tokens) for row in group])
    case.close("size", counts[:, :, None], 0.0)
    case.same("raster", tome.raster(group, tokens))
    r = (20, -1.0) if case.name == "down" else [*tome.even_schedule(576, tokens - 1, 23), 0]
    case.equal("r", tome.schedule(24, r), params["r"])
    left, after = 577, []
    for number in params["r"]:
        left -= number
        after.append(left)
    case.equal("tokens_after_block", after, params["tokens_after_block"])
    for wanted, numbers in case.golden.about["params"]["parse_r"].items():
        blocks, asked = ast.literal_eval(wanted)
        case.equal(f"parse_r {wanted}", tome.schedule(blocks, asked), numbers)
    case.needless("pixel_values")
    case.needs_tower("tokens", "group")
