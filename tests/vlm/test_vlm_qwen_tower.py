"""The loop over the Qwen-VL towers, against upstream's forward and against plain loops."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from ocvtp.vlm.layouts import qwen_geometry
from ocvtp.vlm.layouts.units import scored_block
from ocvtp.vlm.towers.qwen import run_qwen_tower
from tests.vlm.tiny_qwen import DEPTH, FAMILIES, FULL, MERGE, STACKED, WIDTH, WINDOW, grid, pixels, units

# Sizes that fill windows of 2 x 2 units and ones that don't, twice the same, and a video among them.
MIXED = grid((1, 6, 10), (1, 4, 4), (3, 6, 8), (1, 10, 14), (1, 6, 10))
GRIDS = {
    "mixed": MIXED,
    "one image": grid((1, 6, 10)),
    "one unit": grid((1, 2, 2)),
    "video": grid((3, 6, 10)),
    "windows filled": grid((1, 8, 8), (2, 4, 8)),
}

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def towers() -> dict[str, Any]:
    return {family: make().model.visual for family, make in FAMILIES.items()}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def upstream(
    tower: Any, values: torch.Tensor, grid_thw: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``pooler_output`` and, with DeepStack, ``deepstack_features``."""
    out = tower(values, grid_thw=grid_thw)
    return out.pooler_output, list(getattr(out, "deepstack_features", None) or [])


def tower_order(family: str, grid_thw: torch.Tensor) -> torch.Tensor:
    """Unit at each place of the tower, by sorting units by frame, window, and place in the window."""
    window = WINDOW if family == "qwen2_5_vl" else 1000
    keys = [
        (image, frame, y // window, x // window, y, x)
        for image, (t, h, w) in enumerate(grid_thw.tolist())
        for frame in range(t)
        for y in range(h // MERGE)
        for x in range(w // MERGE)
    ]
    return torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))


def blocks_seen(tower: Any, values: torch.Tensor, grid_thw: torch.Tensor) -> list[dict[str, Any]]:
    """What upstream's blocks put out, and the queries, keys and angles inside them."""
    seen: list[dict[str, Any]] = [{} for _ in tower.blocks]
    handles = []
    for block, found in zip(tower.blocks, seen, strict=True):
        handles += [
            block.register_forward_hook(lambda m, a, out, found=found: found.update(output=out)),
            block.attn.qkv.register_forward_hook(lambda m, a, out, found=found: found.update(qkv=out)),
            block.attn.register_forward_pre_hook(
                lambda m, a, kwargs, found=found: found.update(angles=kwargs["position_embeddings"]),
                with_kwargs=True,
            ),
        ]
    tower(values, grid_thw=grid_thw)
    for handle in handles:
        handle.remove()
    return seen


def plain_scores(found: dict[str, Any], heads: int, grid_thw: torch.Tensor) -> torch.Tensor:
    """Received attention of each unit in the tower's order, frame by frame in float64."""
    query, key, _ = found["qkv"].double().unflatten(-1, (3, heads, -1)).unbind(1)
    cos, sin = (angle.double()[:, None] for angle in found["angles"])

    def turn(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    query, key, start, scores = turn(query), turn(key), 0, []
    for t, h, w in grid_thw.tolist():
        for _ in range(t):
            frame = slice(start, start + h * w)
            logits = torch.einsum("qhd,khd->hqk", query[frame], key[frame]) * query.shape[-1] ** -0.5
            scores.append(logits.softmax(-1).mean((0, 1)))
            start += h * w
    return torch.cat(scores).view(-1, MERGE**2).sum(-1)


# -------------------------------------------------------------------------------------------- what it gives


@pytest.mark.parametrize("grids", GRIDS)
@every_family
def test_bits_of_upstream(towers: dict[str, Any], family: str, grids: str) -> None:
    tower, grid_thw = towers[family], GRIDS[grids]
    values = pixels(grid_thw)
    pooled, stacked = upstream(tower, values, grid_thw)
    run = run_qwen_tower(tower, values, grid_thw, [])
    assert torch.equal(run.merged(), pooled)
    assert len(run.deepstack()) == len(stacked) == (len(STACKED) if family.startswith("qwen3_vl") else 0)
    assert all(map(torch.equal, run.deepstack(), stacked))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_family
def test_bits_of_upstream_in_half_precision(family: str, dtype: torch.dtype) -> None:
    tower = FAMILIES[family]().model.visual
    wide = run_qwen_tower(tower, pixels(MIXED), MIXED, [1]).received_attention("torch")
    tower.to(dtype)
    values = pixels(MIXED)
    pooled, stacked = upstream(tower, values, MIXED)
    run = run_qwen_tower(tower, values, MIXED, [1])
    assert torch.equal(run.merged(), pooled)
    assert all(map(torch.equal, run.deepstack(), stacked))
    assert run.features(1).dtype == dtype
    scores = run.received_attention("torch")
    assert scores.dtype == torch.float32
    assert torch.corrcoef(torch.stack([scores, wide]))[0, 1] > 0.9


@every_family
def test_bits_of_upstream_under_autocast(towers: dict[str, Any], family: str) -> None:
    tower, values = towers[family], pixels(MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        pooled, stacked = upstream(tower, values, MIXED)
        run = run_qwen_tower(tower, values, MIXED, [1])
        assert torch.equal(run.merged(), pooled)
        assert all(map(torch.equal, run.deepstack(), stacked))
        assert run.received_attention("torch").dtype == torch.float32


@every_family
def test_kept_units_only(towers: dict[str, Any], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tower, values = towers[family], pixels(MIXED)
    pooled, stacked = upstream(tower, values, MIXED)
    run = run_qwen_tower(tower, values, MIXED, [])
    merged_rows: list[int] = []
    for merger in (tower.merger, *getattr(tower, "deepstack_merger_list", ())):
        forward = merger.forward
        monkeypatch.setattr(
            merger, "forward", lambda x, forward=forward: (merged_rows.append(len(x)), forward(x))[1]
        )
    kept = torch.tensor([70, 3, 0, 104, 14, 15, 41])
    torch.testing.assert_close(run.merged(kept), pooled[kept], atol=1e-5, rtol=1e-5)
    assert len(run.merged(kept[:0])) == 0
    for got, want in zip(run.deepstack(kept), stacked, strict=True):
        torch.testing.assert_close(got, want[kept], atol=1e-5, rtol=1e-5)
    assert set(merged_rows) == {7 * MERGE**2, 0}


@every_family
def test_features_in_the_original_order(towers: dict[str, Any], family: str) -> None:
    tower, values = towers[family], pixels(MIXED)
    seen = blocks_seen(tower, values, MIXED)
    run = run_qwen_tower(tower, values, MIXED, range(DEPTH))
    order = tower_order(family, MIXED)
    assert (family == "qwen2_5_vl") == (order.tolist() != sorted(order.tolist()))
    for layer, found in enumerate(seen):
        want = torch.empty(len(order), WIDTH)
        want[order] = found["output"].view(-1, MERGE**2, WIDTH).mean(1)
        assert torch.equal(run.features(layer), want)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_family
def test_scores(family: str, attention: str) -> None:
    tower, values = FAMILIES[family](attention).model.visual, pixels(MIXED)
    seen = blocks_seen(tower, values, MIXED)
    run = run_qwen_tower(tower, values, MIXED, [])
    pooled, _ = upstream(tower, values, MIXED)
    assert torch.equal(run.merged(), pooled)
    order = tower_order(family, MIXED)
    want = torch.empty(len(order), dtype=torch.float64)
    want[order] = plain_scores(seen[DEPTH - 1], 4, MIXED)
    got = run.received_attention("torch")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-4)
    frames = [n // t for n, (t, _, _) in zip(units(MIXED), MIXED.tolist(), strict=True) for _ in range(t)]
    sums = torch.stack([frame.sum() for frame in got.split(frames)])
    torch.testing.assert_close(sums, torch.ones(len(frames)))


def test_scores_by_the_kernel(towers: dict[str, Any]) -> None:
    grid_thw = grid((1, 6, 4), (1, 2, 2), (1, 6, 4))
    run = run_qwen_tower(towers["qwen2_5_vl"], pixels(grid_thw), grid_thw, [])
    want = run.received_attention("torch")
    torch.testing.assert_close(run.received_attention("triton"), want, atol=1e-6, rtol=1e-4)


def test_scores_come_from_a_block_with_full_attention() -> None:
    tower = FAMILIES["qwen2_5_vl"](fullatt_block_indexes=[4, 1]).model.visual
    seen = blocks_seen(tower, pixels(MIXED), MIXED)
    run = run_qwen_tower(tower, pixels(MIXED), MIXED, [])
    want = torch.empty(len(run.merged()), dtype=torch.float64)
    want[tower_order("qwen2_5_vl", MIXED)] = plain_scores(seen[4], 4, MIXED)
    torch.testing.assert_close(run.received_attention("torch").double(), want, atol=1e-6, rtol=1e-4)
    assert scored_block(tower, len(tower.blocks)) == 4


def test_no_scores_without_full_attention() -> None:
    tower = FAMILIES["qwen2_5_vl"](fullatt_block_indexes=[]).model.visual
    pooled, _ = upstream(tower, pixels(MIXED), MIXED)
    run = run_qwen_tower(tower, pixels(MIXED), MIXED, [])
    assert torch.equal(run.merged(), pooled)
    with pytest.raises(ValueError, match="no block with full attention"):
        run.received_attention("torch")


@every_family
def test_a_batch_is_its_images(towers: dict[str, Any], family: str) -> None:
    tower, values = towers[family], pixels(MIXED)
    run = run_qwen_tower(tower, values, MIXED, [2])
    parts = values.split(MIXED.prod(-1).tolist())
    alone = [run_qwen_tower(tower, part, one[None], [2]) for part, one in zip(parts, MIXED, strict=True)]
    for got, want in (
        (run.merged(), [one.merged() for one in alone]),
        (run.features(2), [one.features(2) for one in alone]),
        (run.received_attention("torch"), [one.received_attention("torch") for one in alone]),
    ):
        torch.testing.assert_close(got, torch.cat(want), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------ how it runs


@every_family
def test_a_tap_is_told_before_the_next_block_runs(towers: dict[str, Any], family: str) -> None:
    tower, values = towers[family], pixels(MIXED)
    events: list[str] = []
    told: dict[int, torch.Tensor] = {}
    handles = [
        block.register_forward_hook(lambda m, a, out, i=i: events.append(f"block {i}"))
        for i, block in enumerate(tower.blocks)
    ]

    def after(layer: int, features: torch.Tensor) -> None:
        events.append(f"tap {layer}")
        told[layer] = features

    run = run_qwen_tower(tower, values, MIXED, [3, 1, 1], after)
    for handle in handles:
        handle.remove()
    want = [f"block {i}" for i in range(DEPTH)]
    want.insert(4, "tap 3")
    want.insert(2, "tap 1")
    assert events == want
    assert all(torch.equal(run.features(layer), told[layer]) for layer in (1, 3))


@every_family
def test_flash_attention_gets_the_bounds(
    towers: dict[str, Any], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With attention of packed sequences, as FlashAttention's, the bounds come along instead of pieces."""
    lengths: list[int] = []

    def packed(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        bounds = kwargs["cu_seq_lens_q"]
        assert bounds.dtype == torch.int32
        assert kwargs["cu_seq_lens_k"] is bounds
        assert int(kwargs["max_length_q"]) == int(kwargs["max_length_k"]) == int(bounds.diff().max())
        assert "max_seqlen" not in kwargs  # not a parameter of any kernel
        lengths.append(len(bounds) - 1)
        pieces = zip(*(x.split(bounds.diff().tolist(), dim=2) for x in (query, key, value)), strict=True)
        made = [
            torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=kwargs["scaling"])
            for q, k, v in pieces
        ]
        return torch.cat(made, dim=2).transpose(1, 2), None

    AttentionInterface.register("flash_of_this_test", packed)
    tower, values = towers[family], pixels(MIXED)
    pooled, _ = upstream(tower, values, MIXED)
    monkeypatch.setattr(tower.config, "_attn_implementation", "flash_of_this_test")
    run = run_qwen_tower(tower, values, MIXED, [])
    torch.testing.assert_close(run.merged(), pooled, atol=1e-4, rtol=1e-4)
    frames = int(MIXED[:, 0].sum())
    assert [n == frames for n in lengths] == [family != "qwen2_5_vl" or i in FULL for i in range(DEPTH)]


@every_family
def test_threads(towers: dict[str, Any], family: str) -> None:
    tower = towers[family]
    jobs = [(grid_thw, pixels(grid_thw, seed)) for seed, grid_thw in enumerate(GRIDS.values())]

    def work(job: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            run = run_qwen_tower(tower, job[1], job[0], [2])
            return run.merged(), run.features(2), run.received_attention("torch")

    want = [work(job) for job in jobs]
    got: dict[tuple[int, int], tuple[torch.Tensor, ...]] = {}

    def worker(number: int) -> None:
        for turn in range(3):
            which = (number + turn) % len(jobs)
            got[number, which] = work(jobs[which])

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 3 * len(jobs)
    for (_, which), made in got.items():
        assert all(map(torch.equal, made, want[which]))


@every_family
def test_nothing_is_left_on_the_tower(towers: dict[str, Any], family: str) -> None:
    tower = towers[family]
    before = {name: sorted(vars(module)) for name, module in tower.named_modules()}
    run_qwen_tower(tower, pixels(MIXED), MIXED, [2]).received_attention("torch")
    assert {name: sorted(vars(module)) for name, module in tower.named_modules()} == before


@every_family
def test_gradients(family: str) -> None:
    tower, values = FAMILIES[family]().model.visual, pixels(MIXED)
    with torch.inference_mode():  # whatever was kept from this run must not spoil the next
        qwen_geometry.geometry.cache_clear()
        qwen_geometry.corners.cache_clear()
        run_qwen_tower(tower, values, MIXED, [])
    with torch.enable_grad():
        pooled, stacked = upstream(tower, values, MIXED)
        sum(rows.square().sum() for rows in (pooled, *stacked)).backward()
        want = {name: parameter.grad for name, parameter in tower.named_parameters()}
        tower.zero_grad()
        run = run_qwen_tower(tower, values, MIXED, [])
        assert not run.received_attention("torch").requires_grad
        every = torch.arange(len(pooled))
        sum(rows.square().sum() for rows in (run.merged(every), *run.deepstack(every))).backward()
    for name, parameter in tower.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], atol=1e-2, rtol=1e-3)


@every_family
def test_lora(family: str) -> None:
    peft = pytest.importorskip("peft")
    tower = FAMILIES[family]().model.visual
    plain = run_qwen_tower(tower, pixels(MIXED), MIXED, []).received_attention("torch")
    wrapped = peft.get_peft_model(tower, peft.LoraConfig(r=2, target_modules=["qkv"])).eval()
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.copy_(torch.randn_like(parameter))
    run = run_qwen_tower(wrapped.base_model.model, pixels(MIXED), MIXED, [])
    pooled, _ = upstream(wrapped.base_model.model, pixels(MIXED), MIXED)
    assert torch.equal(run.merged(), pooled)
    scores = run.received_attention("torch")
    assert not torch.allclose(scores, plain, atol=1e-3)
    unloaded = wrapped.merge_and_unload()
    again = run_qwen_tower(unloaded, pixels(MIXED), MIXED, []).received_attention("torch")
    torch.testing.assert_close(scores, again, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("buffers", [False, True])
@every_family
def test_weights_on_disk(family: str, buffers: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    tower = FAMILIES[family]().model.visual
    want = run_qwen_tower(tower, pixels(MIXED), MIXED, [2])
    expected = want.merged(), want.features(2), want.received_attention("torch"), *want.deepstack()
    accelerate.disk_offload(tower, str(tmp_path), torch.device("cpu"), offload_buffers=buffers)
    assert {parameter.device.type for parameter in tower.parameters()} == {"meta"}
    run = run_qwen_tower(tower, pixels(MIXED), MIXED, [2])
    got = run.merged(), run.features(2), run.received_attention("torch"), *run.deepstack()
    assert all(map(torch.equal, got, expected))


# ----------------------------------------------------------------------------------------- what it is given


def test_grids_as_numbers(towers: dict[str, Any]) -> None:
    tower, values = towers["qwen2_5_vl"], pixels(MIXED)
    want = run_qwen_tower(tower, values, MIXED, []).merged()
    assert torch.equal(run_qwen_tower(tower, values, MIXED.tolist(), []).merged(), want)
    assert torch.equal(run_qwen_tower(tower, values, [tuple(g) for g in MIXED.tolist()], []).merged(), want)


@pytest.mark.parametrize(
    ("grids", "taps", "message"),
    [
        ([(1, 4, 4), (1, 4, 5)], [], "whole 2 x 2 units"),
        ([(0, 4, 4)], [], "whole 2 x 2 units"),
        ([(4, 4)], [], "frames, rows and columns"),
        ((1, 4, 4), [], "frames, rows and columns"),
        ([], [], "frames, rows and columns"),
        ([(1, 4, 6)], [], "24 patches, but there are 16"),
        ([(1, 4, 4)], [DEPTH], "blocks 0..5"),
        ([(1, 4, 4)], [-1], "blocks 0..5"),
    ],
)
def test_what_makes_no_sense_is_refused(
    towers: dict[str, Any], grids: Sequence[Sequence[int]], taps: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_qwen_tower(towers["qwen2_vl"], pixels(grid((1, 4, 4))), grids, taps)


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_geometry_of_windows(merge: int, window: int) -> None:
    """Every size up to three windows, against a plain loop."""
    for height in range(1, 3 * window + 1):
        for width in (1, window, 2 * window + 1):
            grids = ((2, height * merge, width * merge), (1, merge, merge))
            plan = qwen_geometry.geometry(grids, merge, window, False)
            order, windows, start = [], [0], 0
            for t, h, w in ((2, height, width), (1, 1, 1)):
                for _ in range(t):
                    for top in range(0, h, window):
                        for left in range(0, w, window):
                            inside = [
                                start + y * w + x
                                for y in range(top, min(top + window, h))
                                for x in range(left, min(left + window, w))
                            ]
                            order += inside
                            windows.append(windows[-1] + len(inside) * merge**2)
                    start += h * w
            assert plan.order is not None
            assert plan.places is not None
            assert plan.order.tolist() == order
            assert plan.windows.tolist() == windows
            assert torch.equal(plan.order[plan.places], torch.arange(len(order)))
            assert plan.longest_window == int(plan.windows.diff().max())
            assert plan.longest_frame == int(plan.frames.diff().max())


def test_positions_are_block_major() -> None:
    plan = qwen_geometry.geometry(((1, 2, 4),), 2, None, False)
    assert plan.positions.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]


@pytest.mark.parametrize("size", [2, 4, 6, 10, 14, 46, 48, 50, 98])
def test_corners_interpolate(size: int) -> None:
    """Both ways to round, against ``interpolate`` in float64."""
    side = 48
    table = torch.randn(side * side, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image = table.T.view(1, 3, side, side)
    want = torch.nn.functional.interpolate(image, (size, 6), mode="bilinear", align_corners=True)[0]
    rows, columns = qwen_geometry.geometry(((2, size, 6),), 2, None, False).positions.unbind(-1)
    for closed_form in (False, True):
        made = qwen_geometry.corners(((2, size, 6),), 2, side, closed_form, False)
        got = (table[made.indices] * made.weights[..., None]).sum(1)
        torch.testing.assert_close(got, want[:, rows, columns].T, atol=1e-4, rtol=0)
